"""The tasks of giving one label to each example: the base class, and the task for texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings
from randlora.train.tasks.base import Outcome, Task, log_shares, one_column, require_column
from randlora.train.tasks.texts import Texts


class Classification(Task):
    """A task with one label for each example."""

    label_column = "label"
    metric_names = ("loss", "accuracy", "macro_f1")
    loss_is_mean = True

    def strata(self, rows: Dataset) -> list[Any]:
        """Return the labels of the rows."""
        return list(rows["label"])

    def labels(self, rows: Dataset) -> list[str]:
        """Return the names of the labels: those that the data gives, or its values in order.

        Raises:
            ConfigError: for a single label, or for numbers with a fraction.
        """
        feature = rows.features["label"]
        if hasattr(feature, "names"):
            return list(feature.names)
        found = sorted(set(rows["label"]))
        if len(found) < 2:
            raise ConfigError(f"the training data has the single label {found[0]!r}; a classifier needs two or more")
        parts = [label for label in found if isinstance(label, float) and not label.is_integer()]
        if parts:
            raise ConfigError(
                f"the training data has labels such as {parts[0]}: a classifier needs words or whole numbers; take "
                "task='regression', or name another column by label_column"
            )
        return [str(label) for label in found]

    def encode(self, rows: Dataset, labels: list[str]) -> Dataset:
        """Return the rows with labels as numbers, by their names."""
        feature = rows.features["label"]
        given = [str(feature.int2str(one)) for one in rows["label"]] if hasattr(feature, "names") else rows["label"][:]
        numbers = numbers_of(given, labels)
        return rows.remove_columns("label").add_column("label", numbers)

    def outcome(self, kept: np.ndarray, targets: np.ndarray, labels: list[str]) -> Outcome:
        """Return accuracy, the mean F1 of the labels, and the counts of labels and predictions."""
        shares = log_shares(kept)
        guessed = shares.argmax(-1)
        counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
        np.add.at(counts, (targets, guessed), 1)
        found = counts.diagonal()
        by_label = {name: (int(counts[number].sum()), int(found[number])) for number, name in enumerate(labels)}
        metrics = {
            "loss": float(-np.take_along_axis(shares, targets[:, None], -1).mean()),
            "accuracy": float(found.sum() / len(targets)),
            "macro_f1": macro_f1(counts),
        }
        return Outcome(metrics, 0, int(found.sum()), by_label, tuple(tuple(row) for row in counts.tolist()))

    def records(
        self, rows: Dataset, prepared: Dataset, kept: np.ndarray, labels: list[str], processor: Any
    ) -> Iterable[dict[str, Any]]:
        """Yield the label, the prediction, and its confidence, for each example."""
        for shown, label, shares in zip(self.shown(rows), rows["label"], log_shares(kept), strict=True):
            guess = int(shares.argmax())
            yield {
                **shown,
                "label": labels[int(label)],
                "predicted": labels[guess],
                "confidence": float(np.exp(shares[guess])),
                "loss": float(-shares[int(label)]),
            }

    @abstractmethod
    def shown(self, rows: Dataset) -> Iterable[dict[str, str]]:
        """Yield the text that names each example in a list: ``text``, and for a pair ``text_pair``."""


def macro_f1(counts: np.ndarray) -> float:
    """Return the mean F1 of the labels that occur or were predicted, from counts (labels, predicted labels)."""
    either = counts.sum(0) + counts.sum(1)
    there = either > 0
    return float((2 * counts.diagonal()[there] / either[there]).mean())


class SequenceClassification(Texts, Classification):
    """Classification of texts, or of pairs of texts."""

    name = "sequence-classification"
    problem_type = "single_label_classification"

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the columns ``text`` and ``label``; for pairs also ``text_pair``."""
        column = one_column("label_column", settings, "label")
        require_column(rows, column, "label_column", source, is_label)
        texts = self.texts(rows, settings, source)
        return texts.add_column("label", rows[column][:], feature=rows.features[column])


def is_label(feature: Any) -> bool:
    """Return whether a column has words or numbers."""
    return isinstance(feature, Value | ClassLabel)


def numbers_of(given: Iterable[Any], labels: list[str]) -> list[int]:
    """Return the numbers of labels: their places in ``labels``.

    Raises:
        ConfigError: naming the labels that ``labels`` does not have.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    found = [str(label) for label in given]
    unknown = sorted(set(found) - set(numbers))
    if unknown:
        raise ConfigError(f"the evaluation data has labels that the training data has not: {unknown}; known: {labels}")
    return [numbers[label] for label in found]
