"""The task of giving a label to an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, default_data_collator

from randlora.train.settings import TrainSettings
from randlora.train.tasks.base import from_pretrained, is_text, one_column, require_column
from randlora.train.tasks.classification import Classification, is_label
from randlora.train.tasks.quantized import weights_as
from randlora.train.tasks.texts import renamed


class ImageClassification(Classification):
    """Classification of images. Images are files; a file is opened only for its batch."""

    name = "image-classification"
    model_type = "IMAGE_CLS"
    input_column = "image"
    counts_tokens = False

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the columns ``image`` and ``label``; paths of images are relative to the folder of the data."""
        label = one_column("label_column", settings, "label")
        require_column(rows, label, "label_column", source, is_label)
        return _images(rows, {"label": label}, settings, source)

    def inputs(self, rows: Dataset, settings: TrainSettings, source: str) -> list[Any]:
        """Return the images as files, or as the bytes of files, not opened yet."""
        return list(_images(rows, {}, settings, source).cast_column("image", Image(decode=False))["image"])

    def identities(self, rows: Dataset) -> list[str]:
        """Return the paths of the files, or numbers where there are no paths."""
        files = rows.cast_column("image", Image(decode=False))["image"]
        return [file["path"] or f"image {number}" for number, file in enumerate(files)]

    def shown(self, rows: Dataset) -> Iterable[dict[str, str]]:
        """Yield the names of the files."""
        return ({"text": name} for name in self.identities(rows))

    def load_processor(self, settings: TrainSettings) -> Any:
        """Return the processor that scales and normalises images for the model."""
        return from_pretrained(AutoImageProcessor, settings)

    def load_model(self, settings: TrainSettings, labels: list[str], processor: Any) -> PreTrainedModel:
        """Return the pretrained model with a head for ``labels``."""
        return from_pretrained(AutoModelForImageClassification, settings, **self.head(labels), **weights_as(settings))

    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Return examples whose pixels are computed when a batch asks for them."""

        def pixels(batch: dict[str, Any]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in batch["image"]]
            return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

        return rows.with_transform(pixels)

    def collator(self, processor: Any) -> Callable[[Any], Any]:
        """Return a function that stacks images; the processor has given all of them one size."""
        return default_data_collator


def _images(rows: Dataset, others: dict[str, str], settings: TrainSettings, source: str) -> Dataset:
    """Return the column ``image``, and the columns ``others``, given by their names in the data."""
    column = one_column("input_column", settings, "image")
    require_column(rows, column, "input_column", source, lambda one: isinstance(one, Image) or is_text(one))
    rows = renamed(rows, {"image": column, **others})
    if is_text(rows.features["image"]):
        folder = Path(source).parent
        rows = rows.map(lambda row: {"image": str(folder / row["image"])}).cast_column("image", Image())
    return rows
