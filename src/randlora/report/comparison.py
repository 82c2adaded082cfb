"""The result of a comparison of methods: a table, and the answer in words whether full rank helps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean, median, pvariance
from typing import Any

import numpy as np

from randlora.errors import ConfigError
from randlora.report.runs import Entry, Run, number
from randlora.report.statistics import Interval, crossed_interval
from randlora.report.summary import COLUMNS, summary
from randlora.text import byte_text


@dataclass(frozen=True)
class Method:
    """One method with one learning rate.

    Attributes:
        label: name of the method in tables.
        rate: the learning rate.
        enclosed: whether a lower and a higher rate were tried, and both are worse.
        trainable: number of trainable values.
        runs: one run for each seed, all tested on the same examples.
        forgotten: amount that each run forgot; empty where forgetting was not measured.
        lora: label of the LoRA with about as many trainable values; ``None`` if the method is not RandLoRA.
    """

    label: str
    rate: float
    enclosed: bool
    trainable: int
    runs: tuple[Run, ...]
    forgotten: tuple[float, ...] = ()
    lora: str | None = None


@dataclass(frozen=True)
class Difference:
    """The gain of one method over another, on the same examples with the same seeds.

    Attributes:
        ours: the first method.
        other: the second method.
        gain: mean gain of ``ours`` over ``other`` and its interval; positive where ``ours`` is better.
    """

    ours: Method
    other: Method
    gain: Interval


class Comparison:
    """Methods side by side.

    Args:
        methods: the methods, in the order of the table.
        forgotten: name of the measure in ``Method.forgotten``, such as "neighbours lost".

    Raises:
        ConfigError: if a run has no predictions, or predictions for other examples than the rest.
    """

    def __init__(self, methods: Sequence[Method], forgotten: str = "") -> None:
        self.methods = tuple(methods)
        self._forgotten = forgotten
        first = self.methods[0].runs[0]
        for run in (run for method in self.methods for run in method.runs):
            if not run.examples or _texts(run) != _texts(first):
                raise ConfigError(f"{run.folder}: its predictions are not of the examples of {first.folder}")
        self.seeds = len(self.methods[0].runs)
        self.examples = len(first.examples)
        self._weights = np.array([number(one.get("tokens", 1)) for one in first.examples])
        self._values = {one.label: np.array([self._of(run) for run in one.runs]) for one in self.methods}

    @cached_property
    def score_name(self) -> str:
        """The name of the compared score: accuracy, exact match, R² or loss."""
        example = self.methods[0].runs[0].examples[0]
        if "predicted" not in example:
            return "loss"
        if isinstance(example["predicted"], list):
            return "exact match"
        return "accuracy" if isinstance(example["predicted"], str) else "R²"

    @property
    def is_share(self) -> bool:
        """Whether the score is a share of right answers, from 0 to 1."""
        return self.score_name in ("accuracy", "exact match")

    @property
    def columns(self) -> list[str]:
        """The headings of the table's columns."""
        score = f"{self.score_name} (95%)"
        forgotten = [self._forgotten] if self._forgotten else []
        return ["method", "learning rate", "trainable", score, *forgotten, "s/step", "peak memory", "saved"]

    @property
    def rows(self) -> list[list[str]]:
        """The cells of the table, one row for each method."""
        return [self._row(method) for method in self.methods]

    @property
    def note(self) -> str:
        """An explanation of the table's numbers."""
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"
        covers = (
            "The interval covers the choice of the examples alone: one seed has no spread"
            if self.seeds == 1
            else "The interval covers the choice of examples and of seeds (order of the data, new head, dropout)"
        )
        forgotten = f" {self._forgotten.capitalize()}: mean, and range of the seeds." if self._forgotten else ""
        return (
            f"{seeds}, {self.examples:,} test examples, the same for all. {covers}; it does not cover the split of the "
            "data nor the choice of the learning rate, which was made on a part of the training data."
            f"{forgotten} s/step: median. Peak memory: of the first seed's whole process, or on the GPU where there is "
            "one. Saved: weights on disk."
        )

    def as_json(self) -> dict[str, Any]:
        """Return scores, differences and answer as an object for JSON."""
        return {
            "methods": [
                {
                    "method": one.label,
                    "learning_rate": one.rate,
                    "enclosed": one.enclosed,
                    "trainable": one.trainable,
                    {"exact match": "exact_match", "R²": "r2"}.get(self.score_name, self.score_name): asdict(
                        self.score(one)
                    ),
                    "forgotten": one.forgotten,
                    "lora": one.lora,
                    "runs": [str(run.folder) for run in one.runs],
                }
                for one in self.methods
            ],
            "matched": [
                {"randlora": one.ours.label, "lora": one.other.label, "gain": asdict(one.gain)} for one in self.matched
            ],
            "answer": self.answer,
            "seeds": self.seeds,
            "examples": self.examples,
        }

    def score(self, method: Method) -> Interval:
        """Return the method's mean score over seeds and examples, with its interval."""
        return crossed_interval(self._values[method.label], self._weights, is_share=self.is_share)

    def difference(self, ours: Method, other: Method, confidence: float = 0.95) -> Difference:
        """Return the gain of ``ours`` over ``other``."""
        sign = -1 if self.score_name == "loss" else 1
        values = sign * (self._values[ours.label] - self._values[other.label])
        return Difference(ours, other, crossed_interval(values, self._weights, confidence))

    @property
    def matched(self) -> list[Difference]:
        """The gain of each RandLoRA over its LoRA; 95% is the confidence in all intervals together (Bonferroni)."""
        by_label = {method.label: method for method in self.methods}
        pairs = [(one, by_label[one.lora]) for one in self.methods if one.lora in by_label]
        return [self.difference(ours, lora, 1 - 0.05 / len(pairs)) for ours, lora in pairs]

    @property
    def answer(self) -> list[str]:
        """The answer in sentences: whether full rank helps, the best r and rate, full fine-tuning, and doubts."""
        return [*self._full_rank(), *self._randlora(), *self._full_fine_tuning(), *self._doubts()]

    def _full_rank(self) -> list[str]:
        matched = self.matched
        if not matched:
            return ["Does full rank help here? No LoRA was trained beside RandLoRA: not known."]
        learnt = any(self._has_learnt(one) for pair in matched for one in (pair.ours, pair.other))
        better = [one for one in matched if one.gain.low > 0]
        worse = [one for one in matched if one.gain.high < 0]
        if self._constant is not None and not learnt:
            verdict = f"Not known: neither RandLoRA nor LoRA does better than {self._constant[0]}; give more minutes"
        elif better:
            best = max(better, key=lambda one: one.gain.mean)
            verdict = f"Yes: {best.ours.label} at {best.ours.rate:g} is better than LoRA with as many values"
            verdict += f", but {_labels([one.ours for one in worse])} worse" if worse else ""
        elif len(worse) == len(matched):
            verdict = "No: LoRA with as many values is better"
        else:
            most = max(one.gain.high for one in matched)
            verdict = f"Not that these runs could tell; a gain of more than {self._amount(most)} is unlikely"
        together = ", together 95%" if len(matched) > 1 else ""
        pairs = "; ".join(f"{one.ours.label} against {one.other.label}: {self._gain(one.gain)}" for one in matched)
        return [f"Does full rank help here? {verdict}. (Gain{together}: {pairs}.)"]

    def _randlora(self) -> list[str]:
        ours = [one for one in self.methods if one.lora is not None]
        if not any(map(self._has_learnt, ours)):
            return []
        best = max(ours, key=self._goodness)
        said = f"RandLoRA did best with {best.label.removeprefix('RandLoRA ')} at a learning rate of {best.rate:g}."
        alike = [best, *(one for one in ours if one is not best and self.difference(best, one).gain.low <= 0)]
        if len(alike) > 1:
            said += f" {_labels(alike)} cannot be told apart"
            fewest = [one for one in alike if one.trainable == min(other.trainable for other in alike)]
            if len(fewest) < len(alike):
                said += f"; {_labels(fewest)} train{'s' if len(fewest) == 1 else ''} fewest values"
            said += "."
        return [said]

    def _full_fine_tuning(self) -> list[str]:
        full = next((one for one in self.methods if one.label == "full fine-tuning"), None)
        loras = [one for one in self.methods if one.label in {other.lora for other in self.methods}]
        if full is None or not loras:
            return []
        best = max(loras, key=self._goodness)
        gain = self.difference(full, best).gain
        said = f"Full fine-tuning against {best.label}: {self._gain(gain)}"
        is_hint = gain.low <= 0 and (self._has_learnt(full) or self._has_learnt(best))
        return [said + ("; where it gains nothing, expect little of full rank." if is_hint else ".")]

    def _doubts(self) -> list[str]:
        said = []
        edge = [one for one in self.methods if not one.enclosed]
        if edge:
            said.append(
                f"The rate of {_labels(edge)} is the last that was tried on its side: a better one may lie beyond."
            )
        if self._constant is not None:
            words, score = self._constant
            blind = [one for one in self.methods if self.score(one).low <= score]
            said += [f"Not surely better than {words}: {_labels(blind)}."] if blind else []
        if self.seeds < 3:
            said.append("With fewer than three seeds the spread is hardly known: give more minutes.")
        return said

    @cached_property
    def _constant(self) -> tuple[str, float] | None:
        """The best constant answer in words, and its score; ``None`` for tags and where examples have no labels."""
        if self.score_name == "R²":
            return "always saying the mean, of which R² is 0", 0.0
        examples = self.methods[0].runs[0].examples
        if not self.is_share or "label" not in examples[0] or "correct" in examples[0]:
            return None
        label, count = Counter(_label(one["label"]) for one in examples).most_common(1)[0]
        share = count / len(examples)
        return f"always saying {label!r}, which is right in {share:.1%}", share

    def _has_learnt(self, method: Method) -> bool:
        """Return whether the method's score is above that of the best constant answer, where there is one."""
        return self._constant is None or self.score(method).mean > self._constant[1]

    def _row(self, method: Method) -> list[str]:
        cells = [dict(zip(COLUMNS, summary(run), strict=True)) for run in method.runs]
        forgotten = [self._lost(method.forgotten)] if self._forgotten else []
        return [
            method.label,
            f"{method.rate:g}",
            f"{method.trainable:,}",
            self._text(self.score(method)),
            *forgotten,
            f"{median(float(one['s/step'].order) for one in cells):.3g}",
            byte_text(_device_bytes(method.runs[0]) or float(cells[0]["peak memory"].order)),
            byte_text(float(cells[0]["saved"].order)),
        ]

    def _goodness(self, method: Method) -> float:
        return self.score(method).mean * (-1 if self.score_name == "loss" else 1)

    def _text(self, score: Interval) -> str:
        if self.is_share:
            return f"{score.mean:.1%} ({100 * score.low:.1f}–{100 * score.high:.1f})"
        return f"{score.mean:.4f} ({score.low:.4f}–{score.high:.4f})"

    def _gain(self, gain: Interval) -> str:
        low, high = (
            f"{end * (100 if self.is_share else 1):+.{1 if self.is_share else 4}f}" for end in (gain.low, gain.high)
        )
        return f"{'+' if gain.mean > 0 else ''}{self._amount(gain.mean)} ({low} to {high})"

    def _amount(self, value: float) -> str:
        return (
            f"{100 * value:.1f} points"
            if self.is_share
            else f"{value:.4f} of {'R²' if self.score_name == 'R²' else 'the loss'}"
        )

    def _lost(self, values: Sequence[float]) -> str:
        if not values:
            return "–"
        form = "{:.1%}" if "neighbours" in self._forgotten else "{:+.3f}"
        mean, low, high = (form.format(one) for one in (fmean(values), min(values), max(values)))
        return f"{mean} ({low.rstrip('%')}–{high.rstrip('%')})"

    def _of(self, run: Run) -> list[float]:
        """Return the score of each example.

        A labelled example scores 1 if the answer is right and 0 if not, a tagged text its share of right tokens, and an
        example without a label its loss. In a regression an example scores 1 minus its squared error in units of the
        labels' variance, so that the mean over examples is R².
        """
        if self.score_name != "R²":
            return [_value(example) for example in run.examples]
        labels = [number(example["label"]) for example in run.examples]
        variance = pvariance(labels) or 1.0
        return [1 - number(example["loss"]) / variance for example in run.examples]


def _texts(run: Run) -> list[tuple[Any, Any]]:
    return [(example.get("text"), example.get("text_pair")) for example in run.examples]


def _label(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _value(example: Entry) -> float:
    if "correct" in example:
        return number(example["correct"]) / max(number(example["tokens"]), 1.0)
    if "predicted" in example:
        return float(example["predicted"] == example.get("label"))
    return number(example.get("loss"))


def _device_bytes(run: Run) -> float:
    """Return the peak memory on the GPU in bytes; 0 where no GPU was used."""
    return max((number(step.get("device_memory_bytes", 0)) for step in run.steps), default=0)


def _labels(methods: Sequence[Method]) -> str:
    *most, last = [one.label for one in methods]
    return f"{', '.join(most)} and {last}" if most else last
