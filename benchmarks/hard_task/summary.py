"""The runs of a method at a budget as one row."""

from statistics import fmean, stdev
from typing import Any

from .cost import Costs
from .settings import Task
from .study import Results, Run, finished, loss, rates, settled

NEAR = 0.1  # bits per byte
TEXTS = ("source", "english")
COLUMNS = (
    "budget",
    "method",
    "trainable",
    "learning rate",
    *TEXTS,
    "rates within 0.1",
    "lost at",
    "seconds",
    "× frozen",
    "file",
)
"""source, english: bits per byte of held-out text, mean ± standard deviation over the seeds at the best rate.

rates within 0.1: the lowest and the highest rate up to which every run is within 0.1 bits of the best. lost at: the
lowest rate above the best at which the model ends worse on source than it began, or with a loss that is not a number.
seconds, × frozen: time of a step, with all methods in turn. file: bytes that `save_pretrained` writes by default.
"""
Row = dict[str, Any]


def rows(task: Task, results: Results, costs: Costs, before: dict[str, float]) -> list[Row]:
    """Return a row for the model as it was, then one for each method at each budget that is done."""
    untouched = dict.fromkeys(COLUMNS) | {"budget": "own", "method": "no adaptation", "trainable": 0, "runs": [before]}
    untouched |= {"learning rate": "", "rates within 0.1": "", **{text: measured([before[text]]) for text in TEXTS}}
    return [untouched, *(row(task, *cell, results, before) | costs[cell] for cell in finished(task, results))]


def row(task: Task, name: str, r: int, results: Results, before: dict[str, float]) -> Row:
    best = settled(name, r, results)
    if best is None:
        raise RuntimeError(f"{name} at r={r}: not all runs are done")
    swept = [results[Run(name, r, rate, 0)] for rate in rates(name, r, results)]
    others = [results[Run(name, r, best, seed)] for seed in range(1, task.seeds)]
    runs = [one for one in swept if one["rate"] == best] + others
    low, high = near(swept)
    lost = [one["rate"] for one in swept if one["rate"] > best and not loss(one) <= before["source"]]
    return {
        "budget": f"r = {r}" if r else "own",
        "method": name,
        "trainable": runs[0]["trainable"],
        "learning rate": f"{best:g}",
        **{text: measured([one[text] for one in runs]) for text in TEXTS},
        "rates within 0.1": f"{low:g} to {high:g}",
        "lost at": min(lost, default=None),
        "runs": [*swept, *others],
    }


def measured(values: list[float | None]) -> str:
    """Return the mean ± the standard deviation, or the number of missing values."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return f"{len(values) - len(numbers)} of {len(values)} lost"
    return f"{fmean(numbers):.3f}" + (f" ± {stdev(numbers):.3f}" if len(numbers) > 1 else "")


def near(swept: list[Row]) -> tuple[float, float]:
    """Return the ends of the rates, without a gap, whose result is near the best; ``swept`` is in their order."""
    losses = [loss(one) for one in swept]
    first = last = losses.index(min(losses))
    while first > 0 and losses[first - 1] <= min(losses) + NEAR:
        first -= 1
    while last + 1 < len(losses) and losses[last + 1] <= min(losses) + NEAR:
        last += 1
    return swept[first]["rate"], swept[last]["rate"]
