"""A run's training and evaluation data in a folder, so that other runs have the same examples."""

from __future__ import annotations

from pathlib import Path

from datasets import ClassLabel, Dataset, List

from randlora.errors import ConfigError
from randlora.train.data import load_data
from randlora.train.settings import TrainSettings
from randlora.train.stream import Stream
from randlora.train.tasks import TASKS
from randlora.train.tasks.texts import PAIR, Texts
from randlora.tuner.files.atomic import folder_atomically

TRAINING, EVALUATION = "train", "evaluation"


def keep_split(settings: TrainSettings, folder: Path) -> TrainSettings:
    """Write the data of ``settings`` into ``folder``, unless it is there; return settings that read the folder.

    Raises:
        ConfigError: if the data cannot be read.
    """
    kept = {TRAINING: folder / TRAINING, EVALUATION: folder / EVALUATION}
    if not all(place.is_dir() for place in kept.values()):
        data = load_data(settings)
        if isinstance(data.train, Stream):
            raise ConfigError("streaming=True: a split of a stream cannot be kept")
        for name, rows in ((TRAINING, data.train), (EVALUATION, data.evaluation)):
            if not kept[name].is_dir():
                with folder_atomically(kept[name]) as place:
                    _with_names(rows, data.labels, settings).save_to_disk(place)
    here = {"data": str(kept[TRAINING]), "eval_data": str(kept[EVALUATION])}
    pairs = isinstance(settings.input_column, list) and isinstance(TASKS[settings.task], Texts)
    return settings.model_copy(update={**here, "input_column": PAIR if pairs else None, "label_column": None})


def _with_names(rows: Dataset, labels: list[str], settings: TrainSettings) -> Dataset:
    """Return rows whose labels carry the names of all labels, also of those that no row has."""
    column = TASKS[settings.task].label_column
    if not labels or settings.task == "regression":
        return rows
    named = ClassLabel(names=labels)
    return rows.cast_column(column, List(named) if isinstance(rows.features[column], List) else named)
