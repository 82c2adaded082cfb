"""The task of giving any number of labels to a text, none included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, List

from randlora.errors import ConfigError
from randlora.train.bootstrap import bootstrap_intervals
from randlora.train.settings import TrainSettings
from randlora.train.tasks.base import Baseline, Outcome, is_text, require_column
from randlora.train.tasks.classification import is_label, numbers_of
from randlora.train.tasks.texts import Texts

BETWEEN = ";"
"""The separator of the labels of a row in a column of text."""
THRESHOLD = 0.5
"""The probability above which a text gets a label."""


class MultiLabel(Texts):
    """Multi-label classification of texts, or of pairs of texts; each label is a decision of its own."""

    name = "multi-label-classification"
    problem_type = "multi_label_classification"
    metric_names = ("loss", "micro_f1", "macro_f1", "exact_match")

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the columns ``text`` and ``label``, a list; for pairs also ``text_pair``."""
        column = settings.label_column or "label"
        found, feature = (
            _of_columns(rows, column, source) if isinstance(column, list) else _of_column(rows, column, source)
        )
        return self.texts(rows, settings, source).add_column("label", found, feature=feature)

    def labels(self, rows: Dataset) -> list[str]:
        """Return the names of the labels: those of the data or its columns, or its values in order.

        Raises:
            ConfigError: if there are fewer than two labels, or no row has several.
        """
        inner = rows.features["label"].feature
        if isinstance(inner, ClassLabel):
            return list(inner.names)
        found = sorted({label for labels in rows["label"] for label in labels})
        if len(found) < 2:
            raise ConfigError(f"the training data has the labels {found}; two or more are needed")
        if all(len(labels) < 2 for labels in rows["label"]):
            raise ConfigError(
                f"no row of the training data has several labels, but labels such as {str(found[0])!r}: in text, "
                f"{BETWEEN!r} parts them; one label for each row is task='sequence-classification'"
            )
        return [str(label) for label in found]

    def strata(self, rows: Dataset) -> list[Any]:
        """Return the rarest label of each row, so that a split has rare labels on both sides."""
        counts = Counter(label for labels in rows["label"] for label in labels)
        return [min(labels, key=lambda one: (counts[one], str(one)), default="") for labels in rows["label"]]

    def encode(self, rows: Dataset, labels: list[str]) -> Dataset:
        """Return the rows with labels as sorted numbers, by their names."""
        inner = rows.features["label"].feature
        names = inner.int2str if isinstance(inner, ClassLabel) else str
        numbers = [sorted(numbers_of(map(names, given), labels)) for given in rows["label"]]
        return rows.remove_columns("label").add_column("label", numbers, feature=List(ClassLabel(names=labels)))

    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Return texts as tokens, with 1.0 or 0.0 for each label."""
        count = len(rows.features["label"].feature.names)
        wanted = [_marks(labels, count) for labels in rows["label"]]
        return super().prepare(rows.remove_columns("label"), processor, settings).add_column("labels", wanted)

    def outcome(self, kept: np.ndarray, targets: np.ndarray, labels: list[str]) -> Outcome:
        """Return the F1 of all decisions, the mean F1 of the labels, and the share of texts without a mistake."""
        guessed, wanted = given(kept), targets > 0.5
        metrics = {
            name: float(values[0]) for name, values in _metrics(guessed, wanted, np.ones((1, len(wanted)))).items()
        }
        found = dict(
            zip(labels, zip(wanted.sum(0).tolist(), (guessed & wanted).sum(0).tolist(), strict=True), strict=True)
        )
        losses = _losses(kept, wanted)
        return Outcome({"loss": float(losses.mean()), **metrics}, by_label=found, baseline=_constant(wanted, labels))

    def intervals(self, kept: np.ndarray, targets: np.ndarray) -> dict[str, tuple[float, float]]:
        """Return 95% intervals of all metrics but the loss."""
        guessed, wanted = given(kept), targets > 0.5
        return bootstrap_intervals(lambda counts: _metrics(guessed, wanted, counts), len(wanted))

    def records(
        self, rows: Dataset, prepared: Dataset, kept: np.ndarray, labels: list[str], processor: Any
    ) -> Iterable[dict[str, Any]]:
        """Yield the labels, the predicted labels, and the confidence of the least certain decision."""
        wanted = np.array([_marks(one, len(labels)) for one in rows["label"]]) > 0.5
        shares, losses = probabilities(kept), _losses(kept, wanted)
        for shown, right, guess, row, loss in zip(self.shown(rows), wanted, given(kept), shares, losses, strict=True):
            yield {
                **shown,
                "label": [name for name, there in zip(labels, right, strict=True) if there],
                "predicted": [name for name, there in zip(labels, guess, strict=True) if there],
                "confidence": float(np.maximum(row, 1 - row).min()),
                "loss": float(loss.mean()),
            }


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each label (examples, labels)."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


def given(logits: np.ndarray) -> np.ndarray:
    """Return whether each example gets each label (examples, labels)."""
    return probabilities(logits) > THRESHOLD


def _of_columns(rows: Dataset, columns: list[str], source: str) -> tuple[list[list[int]], List]:
    """Return, for each row, the numbers of the columns with a 1; and the feature of these lists."""
    for column in columns:
        require_column(rows, column, "label_column", source, is_label)
        wrong = next(((row, value) for row, value in enumerate(rows[column]) if value not in (0, 1)), None)
        if wrong:
            raise ConfigError(f"row {wrong[0]} of {source!r} has {wrong[1]!r} in {column!r}: 0 or 1 is needed")
    values = zip(*(rows[column] for column in columns), strict=True)
    found = [[number for number, value in enumerate(row) if value] for row in values]
    return found, List(ClassLabel(names=columns))


def _of_column(rows: Dataset, column: str, source: str) -> tuple[list[list[Any]], Any]:
    """Return the lists of labels, texts split at ``BETWEEN``, and their feature; an empty text has no labels."""
    feature = rows.features.get(column)
    if is_text(feature):
        parts = [[part.strip() for part in (text or "").split(BETWEEN)] for text in rows[column]]
        return [list(filter(None, labels)) for labels in parts], List(feature)
    require_column(rows, column, "label_column", source, lambda one: is_label(getattr(one, "feature", None)))
    for row, labels in enumerate(rows[column]):
        if None in labels or len(set(labels)) < len(labels):
            raise ConfigError(
                f"row {row} of {source!r} has the labels {labels}: a list names each label once; columns of 0 and 1 "
                "are named one by one by label_column"
            )
    return rows[column][:], feature


def _marks(labels: Iterable[int], count: int) -> list[float]:
    there = set(labels)
    return [float(number in there) for number in range(count)]


def _losses(logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the cross entropy of each decision (examples, labels)."""
    return np.logaddexp(0, np.where(wanted, -1, 1) * logits.astype(np.float64))


def _metrics(guessed: np.ndarray, wanted: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return each metric (draws,) of examples that were drawn ``counts`` (draws, examples) times.

    The mean F1 is that of the labels that occur or were predicted, as for single labels.
    """
    hits = counts @ (guessed & wanted).astype(float)
    either = counts @ (guessed.astype(float) + wanted)
    there = either > 0
    by_label = np.where(there, 2 * hits / np.where(there, either, 1), 0)
    return {
        "micro_f1": _f1(hits.sum(1), either.sum(1)),
        "macro_f1": by_label.sum(1) / np.maximum(there.sum(1), 1),
        "exact_match": counts @ (guessed == wanted).all(1) / counts.sum(1),
    }


def _f1(hits: np.ndarray, either: np.ndarray) -> np.ndarray:
    """Return F1: twice the hits divided by labels plus predictions; 0 where there are neither."""
    return 2 * hits / np.maximum(either, 1)


def _constant(wanted: np.ndarray, labels: list[str]) -> Baseline:
    """Return the best constant answer by F1: the most frequent labels, as many as raise it."""
    frequent = np.argsort(-wanted.sum(0), kind="stable")
    sizes = np.arange(1, len(labels) + 1)
    scores = _f1(wanted.sum(0)[frequent].cumsum(), len(wanted) * sizes + wanted.sum())
    best = int(scores.argmax())
    names = [labels[number] for number in sorted(frequent[: best + 1])]
    ((_, most),) = Counter(map(tuple, wanted.tolist())).most_common(1)
    return Baseline(
        f"always saying {BETWEEN.join(names)!r}", {"micro_f1": float(scores[best]), "exact_match": most / len(wanted)}
    )
