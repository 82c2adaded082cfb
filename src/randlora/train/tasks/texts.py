"""The base class of tasks that learn one target for each text, or for each pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedModel

from randlora.train.settings import TrainSettings
from randlora.train.tasks.base import Task, from_pretrained, is_text, require_column
from randlora.train.tasks.quantized import weights_as

PAIR = ["text", "text_pair"]
"""The columns of pairs, by the tokenizers' names."""


class Texts(Task):
    """A task on texts, or on pairs of texts that the tokenizer joins.

    Attributes:
        problem_type: value in the model's config that selects the loss.
    """

    model_type = "SEQ_CLS"
    input_column = "text"
    label_column = "label"
    loss_is_mean = True
    problem_type: ClassVar[str]

    def texts(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the column ``text``; for pairs also ``text_pair``."""
        return renamed(rows, _columns_of_texts(rows, settings, source))

    def inputs(self, rows: Dataset, settings: TrainSettings, source: str) -> list[Any]:
        """Return the texts; pairs of texts as tuples."""
        columns = [list(rows[name]) for name in _columns_of_texts(rows, settings, source).values()]
        return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))

    def identities(self, rows: Dataset) -> list[str]:
        """Return the texts; pairs joined by a tab."""
        return ["\t".join(texts) for texts in zip(*(rows[name] for name in _texts_in(rows)), strict=True)]

    def shown(self, rows: Dataset) -> Iterable[dict[str, str]]:
        """Yield the text, or both texts, of each example, by column."""
        return iter(rows.select_columns(_texts_in(rows)))

    def head(self, labels: Any) -> dict[str, Any]:
        """Return the arguments for a head for ``labels``, with the loss of the task."""
        return {**super().head(labels), "problem_type": self.problem_type}

    def load_model(self, settings: TrainSettings, labels: list[str], processor: Any) -> PreTrainedModel:
        """Return the pretrained model with a head for ``labels``."""
        model = from_pretrained(
            AutoModelForSequenceClassification, settings, **self.head(labels), **weights_as(settings)
        )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = processor.pad_token_id
        return model

    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Return texts as tokens, cut at ``max_length``; in a pair the longer text is cut first."""
        names = _texts_in(rows)
        return rows.map(
            lambda batch: processor(*(batch[name] for name in names), truncation=True, max_length=settings.max_length),
            batched=True,
            remove_columns=names,
        )

    def collator(self, processor: Any) -> Callable[[Any], Any]:
        """Return a function that pads a batch to its longest text."""
        return DataCollatorWithPadding(processor)


def renamed(rows: Dataset, columns: dict[str, str]) -> Dataset:
    """Return only the given columns, renamed; ``columns`` maps names of the task to names in the data."""
    rows = rows.select_columns(list(columns.values()))
    return rows.rename_columns({column: name for name, column in columns.items() if column != name})


def _columns_of_texts(rows: Dataset, settings: TrainSettings, source: str) -> dict[str, str]:
    """Return the columns of the data by the names of the task; each column is checked."""
    given = settings.input_column or "text"
    columns = [given] if isinstance(given, str) else given
    for column in columns:
        require_column(rows, column, "input_column", source, is_text)
    return dict(zip(PAIR, columns, strict=False))


def _texts_in(rows: Dataset) -> list[str]:
    return [name for name in PAIR if name in rows.column_names]
