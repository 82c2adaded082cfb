"""A run as one row of the table that compares runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, median

from randlora.report.runs import Run, number
from randlora.report.statistics import wilson_interval
from randlora.text import byte_text

COLUMNS = (
    "method",
    "state",
    "steps",
    "trainable",
    "training loss",
    "evaluation loss",
    "accuracy (95%)",
    "micro-F1",
    "macro-F1",
    "exact match",
    "R²",
    "RMSE",
    "Pearson",
    "Spearman",
    "perplexity",
    "s/step",
    "peak memory",
    "saved",
)
METRICS = COLUMNS[COLUMNS.index("accuracy (95%)") : COLUMNS.index("s/step")]
"""Columns that differ between tasks."""


@dataclass(frozen=True)
class Cell:
    """A cell of the table: its text, and the value by which rows are sorted."""

    text: str
    order: float | str


def summary(run: Run) -> list[Cell]:
    """Return the cells of a run, in the order of ``COLUMNS``; unknown values are dashes."""
    result = run.result
    last = run.evaluations[-1] if run.evaluations else {}
    steps = number(result.get("steps", max((number(e.get("step")) for e in run.log), default=math.nan)))
    state = _state(run)
    return [
        Cell(run.method or "–", run.method),
        Cell(state, state),
        _cell(steps, ",.0f"),
        _cell(number(result.get("trainable_parameters")), ",.0f"),
        _cell(_mean_loss(run), ".4f"),
        _cell(number(last.get("eval_loss")), ".4f"),
        _accuracy(number(last.get("eval_accuracy", last.get("eval_rewards/accuracies"))), len(run.examples)),
        _cell(number(last.get("eval_micro_f1")), ".1%"),
        _cell(number(last.get("eval_macro_f1")), ".1%"),
        _cell(number(last.get("eval_exact_match")), ".1%"),
        _cell(number(last.get("eval_r2")), ".3f"),
        _cell(number(last.get("eval_rmse")), ".4g"),
        _cell(number(last.get("eval_pearson")), ".3f"),
        _cell(number(last.get("eval_spearman")), ".3f"),
        _cell(number(last.get("eval_perplexity")), ",.2f"),
        _cell(_seconds(run), ".3g"),
        _bytes(_memory(run)),
        _bytes(_saved(run)),
    ]


def _state(run: Run) -> str:
    if run.diverged_at is not None:
        return f"diverged at step {run.diverged_at}"
    logged_its_end = any("train_runtime" in entry for entry in run.log)
    if run.result or (logged_its_end and not run.settings):  # the Trainer logs train_runtime of an interrupted run too
        return "finished"
    return "not finished" if run.log else "–"


def _mean_loss(run: Run) -> float:
    losses = [number(entry["loss"]) for entry in run.steps]
    return fmean(losses) if losses else math.nan


def _seconds(run: Run) -> float:
    """Return the median of the measured seconds of a step; without them, the mean over the training."""
    measured = [seconds for entry in run.steps if not math.isnan(seconds := number(entry.get("seconds")))]
    rates = [number(entry.get("train_steps_per_second")) for entry in run.log if "train_steps_per_second" in entry]
    if measured:
        return median(measured)
    whole = 1 / rates[-1] if rates and rates[-1] > 0 else math.nan
    return number(run.result.get("seconds_per_step", whole))


def _memory(run: Run) -> float:
    held = [number(run.result.get("peak_memory_bytes")), *(number(e.get("memory_bytes")) for e in run.steps)]
    return max((value for value in held if not math.isnan(value)), default=math.nan)


def _saved(run: Run) -> float:
    if run.adapter is None:
        return number(run.result.get("result_bytes"))
    return float(sum(file.stat().st_size for file in run.adapter.glob("adapter_model.*")))


def _accuracy(share: float, tested: int) -> Cell:
    if math.isnan(share) or not 0 <= share <= 1 or not tested:
        return _cell(share, ".1%")
    low, high = wilson_interval(round(share * tested), tested)
    return Cell(f"{share:.1%} ({100 * low:.1f}–{100 * high:.1f})", share)


def _cell(value: float, form: str) -> Cell:
    return Cell("–", -math.inf) if math.isnan(value) else Cell(format(value, form), value)


def _bytes(count: float) -> Cell:
    return Cell("–", -math.inf) if math.isnan(count) else Cell(byte_text(count), count)
