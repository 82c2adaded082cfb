"""The interface of a task: its data, its model, its batches and its metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Value
from peft import TaskType
from transformers import AutoTokenizer, PreTrainedModel

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings

IGNORED = -100  # the label of a token without a loss


@dataclass(frozen=True)
class Baseline:
    """The metrics of the best constant answer, on the same examples.

    Attributes:
        answer: the answer in words, such as "always saying the mean, 3.2".
        metrics: metrics by name; the first decides whether a model is better.
    """

    answer: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """The metrics and counts of a model on data.

    Attributes:
        metrics: metrics by name, ``loss`` among them.
        tokens: number of tokens that the metrics count; 0 where they count examples.
        correct: number of examples, or of tokens, with the right label; ``None`` where answers may be partly right.
        by_label: for each label, the number of examples or tokens that have the label, and the number of these found.
        confusion: for each label, how many of its examples were given each label; empty for tags.
        baseline: the best constant answer, where that is not the most frequent label.
    """

    metrics: dict[str, float]
    tokens: int = 0
    correct: int | None = None
    by_label: dict[str, tuple[int, int]] = field(default_factory=dict)
    confusion: tuple[tuple[int, ...], ...] = ()
    baseline: Baseline | None = None

    @property
    def majority(self) -> tuple[str, float] | None:
        """The most frequent label, and its share: the accuracy of always saying it."""
        total = sum(count for count, _ in self.by_label.values())
        if not total:
            return None
        label = max(self.by_label, key=lambda name: self.by_label[name][0])
        return label, self.by_label[label][0] / total

    @property
    def shortfall(self) -> str:
        """A sentence for a model that does no better than a constant answer; empty for a better model."""
        if self.baseline is not None:
            name, constant = next(iter(self.baseline.metrics.items()))
            if self.metrics[name] > constant:
                return ""
            return f"{name} {self.metrics[name]:.4f} is no better than {self.baseline.answer}: {constant:.4f}"
        there = sum(count > 0 for count, _ in self.by_label.values())
        if self.majority is None or self.correct is None or there < 2:
            return ""
        label, share = self.majority
        often = f"{label!r}, which {share:.1%} of the examples are"
        given = [sum(column) for column in zip(*self.confusion, strict=True)]
        if sum(count > 0 for count in given) == 1:
            only = next(name for name, count in zip(self.by_label, given, strict=True) if count)
            return f"every example was labelled {only!r}: nothing is told apart. The most frequent label is {often}"
        accuracy = self.metrics["accuracy"]
        return "" if accuracy > share else f"accuracy {accuracy:.1%} is no better than always saying {often}"


class Task(ABC):
    """A kind of learning problem. Tasks have no state; ``tasks.TASKS`` has one object of each class.

    Attributes:
        name: the value of ``TrainSettings.task``.
        model_type: key of the model's class in ``tuner.base_model``; PEFT's task type where PEFT has one.
        input_column: name of the input, in the data by default and always in the result of ``read``.
        label_column: name of the label, likewise; empty where the input is its own label.
        metric_names: names of the metrics that ``outcome`` returns.
        loss_is_mean: whether the model's loss is a mean over examples, so that accumulated losses are averaged.
        counts_tokens: whether inputs are tokens.
    """

    name: ClassVar[str]
    model_type: ClassVar[str]
    input_column: ClassVar[str]
    label_column: ClassVar[str] = ""
    metric_names: ClassVar[tuple[str, ...]]
    loss_is_mean: ClassVar[bool] = False
    counts_tokens: ClassVar[bool] = True

    @property
    def peft_type(self) -> TaskType | None:
        """PEFT's name of the task, if it has one."""
        return TaskType.__members__.get(self.model_type)

    @property
    def classifies(self) -> bool:
        """Whether the model gets a new head for the labels of the data."""
        return bool(self.label_column)

    def head(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` for a new head for ``labels``."""
        return {
            "ignore_mismatched_sizes": True,
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }

    # data

    @abstractmethod
    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the columns of the task under its own names; every row is checked.

        Raises:
            ConfigError: if a column is missing, empty or of another kind.
        """

    def inputs(self, rows: Dataset, settings: TrainSettings, source: str) -> list[Any]:
        """Return the inputs of rows, which need no labels: texts, or images in the form of ``datasets``.

        Raises:
            ConfigError: if the column is missing, empty or of another kind.
        """
        column = one_column("input_column", settings, "text")
        require_column(rows, column, "input_column", source, is_text)
        return list(rows[column])

    @abstractmethod
    def identities(self, rows: Dataset) -> list[str]:
        """Return an identity for each row; a split keeps rows of one identity on one side."""

    def labels(self, rows: Dataset) -> list[str]:
        """Return the names of the labels, in the order of their numbers."""
        return []

    def strata(self, rows: Dataset) -> list[Any]:
        """Return the kind of each row; a split has the same share of each kind on both sides."""
        return [None] * len(rows)

    def encode(self, rows: Dataset, labels: list[str]) -> Dataset:
        """Return the rows with labels as numbers.

        Raises:
            ConfigError: if a row has a label that is not in ``labels``.
        """
        return rows

    # model

    def load_processor(self, settings: TrainSettings) -> Any:
        """Return the model's tokenizer, with a padding token.

        Raises:
            ConfigError: if there is no tokenizer that can be loaded.
        """
        tokenizer = from_pretrained(AutoTokenizer, settings)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # of a model without tokenizer files
            raise ConfigError(_missing_part(AutoTokenizer, settings.model))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @abstractmethod
    def load_model(self, settings: TrainSettings, labels: list[str], processor: Any) -> PreTrainedModel:
        """Return the pretrained model with the task's head."""

    # batches

    @abstractmethod
    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Return the examples in the form of the model's inputs.

        Raises:
            ConfigError: if nothing is left to learn from.
        """

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[Any], Any]:
        """Return a function that makes a batch of prepared examples."""

    # results

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Return the part of a batch's logits that ``outcome`` needs."""
        return logits[0] if isinstance(logits, tuple) else logits

    def intervals(self, kept: np.ndarray, targets: np.ndarray) -> dict[str, tuple[float, float]]:
        """Return 95% intervals by metric; where :class:`Outcome` has counts, the interval follows from the counts."""
        return {}

    @abstractmethod
    def outcome(self, kept: np.ndarray, targets: np.ndarray, labels: list[str]) -> Outcome:
        """Return the metrics of the model, from the results of ``reduce`` and the right labels."""

    @abstractmethod
    def records(
        self, rows: Dataset, prepared: Dataset, kept: np.ndarray, labels: list[str], processor: Any
    ) -> Iterable[dict[str, Any]]:
        """Yield the record of each evaluation example: ``text``, ``confidence``, ``loss`` and fields of the task."""


def require_column(rows: Dataset, column: str, setting: str, source: str, fits: Callable[[Any], bool]) -> None:
    """Raise unless a column exists, is of the right kind and has no gaps.

    Args:
        rows: the data.
        column: name of the column.
        setting: setting that names another column.
        source: the file, folder or name of the data, for the message.
        fits: returns whether a feature is of the right kind.

    Raises:
        ConfigError: if the column is missing, of another kind, or has gaps.
    """
    if column not in rows.column_names:
        raise ConfigError(
            f"{source!r} has no column {column!r}; it has {rows.column_names}. Name the right one by {setting}."
        )
    if not fits(rows.features[column]):
        raise ConfigError(
            f"column {column!r} of {source!r} holds no {setting.removesuffix('_column')}s but "
            f"{rows.features[column]}; name another by {setting}"
        )
    empty = [row for row, value in enumerate(rows.with_format("arrow")[column].to_pylist()) if value is None]
    if empty:
        raise ConfigError(f"{source!r} has no {column!r} in {len(empty)} of its rows, first in row {empty[0]}")


def one_column(setting: str, settings: TrainSettings, default: str) -> str:
    """Return the name of a column, for a task that reads one.

    Args:
        setting: ``input_column`` or ``label_column``.
        settings: settings of the run.
        default: the name if the settings give none.

    Raises:
        ConfigError: if several are named.
    """
    given = getattr(settings, setting) or default
    if not isinstance(given, str):
        raise ConfigError(f"{setting}={given}: {settings.task} reads one column")
    return given


_PARTS = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}


def is_text(feature: Any) -> bool:
    """Return whether a column has text."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def from_pretrained(auto_class: Any, settings: TrainSettings, **kwargs: Any) -> Any:
    """Return a part of the pretrained model: model, tokenizer or image processor.

    Raises:
        ConfigError: if the part cannot be loaded.
    """
    try:
        return auto_class.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code, **kwargs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if auto_class.__name__ in _PARTS and (Path(settings.model) / "config.json").is_file():
            raise ConfigError(_missing_part(auto_class, settings.model)) from error
        raise ConfigError(
            f"model={settings.model!r} is neither a folder that {auto_class.__name__} can load nor a model of the hub "
            f"within reach: {str(error).strip()}"
        ) from error


def _missing_part(auto_class: Any, model: str) -> str:
    name = auto_class.__name__
    return (
        f"model={model!r} has no {_PARTS[name]} that can be read beside its weights: save the one that it was trained "
        f"with there, {name}.from_pretrained(…).save_pretrained({model!r})"
    )


def require_length(model: PreTrainedModel, settings: TrainSettings) -> None:
    """Refuse inputs longer than the model's positions.

    Raises:
        ConfigError: naming both lengths.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.max_length > positions:
        raise ConfigError(f"max_length={settings.max_length}: {settings.model!r} takes at most {positions} tokens")


def log_shares(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities (..., labels)."""
    exact = logits.astype(np.float64)
    return exact - np.logaddexp.reduce(exact, axis=-1, keepdims=True)


def exp_of(loss: float) -> float:
    """Return e^loss; losses above 700 count as 700, so that the result is finite."""
    return math.exp(min(loss, 700.0))
