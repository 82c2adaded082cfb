"""The task of giving a number to a text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Dataset, Value

from randlora.errors import ConfigError
from randlora.train.bootstrap import bootstrap_intervals
from randlora.train.settings import TrainSettings
from randlora.train.tasks.base import Baseline, Outcome, one_column, require_column
from randlora.train.tasks.texts import Texts

_FAR = 10.0  # labels so far from 0 are learnt slowly: a new head starts at 0


class Regression(Texts):
    """Regression on texts, or on pairs of texts; the loss is the mean squared error."""

    name = "regression"
    problem_type = "regression"
    metric_names = ("loss", "rmse", "r2", "pearson", "spearman")

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the columns ``text`` and ``label``, for pairs also ``text_pair``; labels are finite numbers."""
        column = one_column("label_column", settings, "label")
        require_column(rows, column, "label_column", source, lambda one: isinstance(one, Value))
        numbers = [_number(value, row, source) for row, value in enumerate(rows[column])]
        return self.texts(rows, settings, source).add_column("label", numbers)

    def labels(self, rows: Dataset) -> list[str]:
        """Return the name of the single output."""
        return ["label"]

    def outcome(self, kept: np.ndarray, targets: np.ndarray, labels: list[str]) -> Outcome:
        """Return the root of the mean squared error, the explained share of the variance, and the correlations."""
        guessed, wanted = _flat(kept), _flat(targets)
        once = np.ones((1, len(wanted)))
        metrics = {name: float(values[0]) for name, values in _metrics(guessed, wanted, once).items()}
        spread, mean = float(wanted.std()), float(wanted.mean())
        answer = f"always saying the mean, {mean:.4g}"
        if max(abs(mean), spread) > _FAR:
            answer += " (a new head starts at 0: labels scaled to about -1 to 1 are learnt sooner)"
        baseline = Baseline(answer, {"r2": 0.0, "rmse": spread})
        return Outcome({"loss": metrics["rmse"] ** 2, **metrics}, baseline=baseline)

    def intervals(self, kept: np.ndarray, targets: np.ndarray) -> dict[str, tuple[float, float]]:
        """Return 95% intervals of all metrics but the loss."""
        guessed, wanted = _flat(kept), _flat(targets)
        return bootstrap_intervals(lambda counts: _metrics(guessed, wanted, counts), len(wanted))

    def records(
        self, rows: Dataset, prepared: Dataset, kept: np.ndarray, labels: list[str], processor: Any
    ) -> Iterable[dict[str, Any]]:
        """Yield the number and the prediction of each example; the loss is the squared error."""
        for shown, wanted, guess in zip(self.shown(rows), rows["label"], _flat(kept).tolist(), strict=True):
            yield {**shown, "label": wanted, "predicted": guess, "loss": (guess - wanted) ** 2}


def _number(value: Any, row: int, source: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"row {row} of {source!r} has the label {value!r}: regression needs a number in every row")
    return found


def _flat(values: np.ndarray) -> np.ndarray:
    """Return outputs (examples, 1) as numbers (examples,)."""
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _metrics(guessed: np.ndarray, wanted: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return each metric (draws,) of examples that were drawn ``counts`` (draws, examples) times."""
    squared = counts @ (guessed - wanted) ** 2
    total = counts.sum(1)
    middle = wanted - (counts @ wanted / total)[:, None]
    around = (counts * middle**2).sum(1)
    return {
        "rmse": np.sqrt(squared / total),
        "r2": np.where(around > 0, 1 - squared / np.where(around > 0, around, 1), np.where(squared > 0, 0.0, 1.0)),
        "pearson": _correlation(np.broadcast_to(guessed, counts.shape), np.broadcast_to(wanted, counts.shape), counts),
        "spearman": _correlation(_ranks(guessed, counts), _ranks(wanted, counts), counts),
    }


def _correlation(one: np.ndarray, other: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation (draws,) of values (draws, examples); 0 where one side does not vary."""
    total = counts.sum(1, keepdims=True)
    one, other = (values - (counts * values).sum(1, keepdims=True) / total for values in (one, other))
    both = (counts * one * other).sum(1)
    sizes = np.sqrt((counts * one**2).sum(1) * (counts * other**2).sum(1))
    return np.clip(np.where(sizes > 0, both / np.where(sizes > 0, sizes, 1), 0.0), -1, 1)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the rank of each value in each draw (draws, examples); equal values share their mean rank."""
    different, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(different)))
    together = np.add.reduceat(counts[:, order], starts, axis=1)
    return (together.cumsum(1) - (together - 1) / 2)[:, place]
