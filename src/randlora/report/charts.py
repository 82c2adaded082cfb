"""The data of the report's plots, thinned out to keep the file small. The page draws the plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from randlora.report.runs import Entry, Run, number
from randlora.report.updates import Updates, natural

MOST_POINTS = 1000  # on one line; longer lines are averaged in groups

_CURVES = (
    # key in the log, title, unit, logarithmic axis, factor
    ("loss", "Training loss", "loss", False, 1.0),
    ("rewards/margins", "Reward of the chosen answer over the other", "margin", False, 1.0),
    ("learning_rate", "Learning rate", "learning rate", False, 1.0),
    ("grad_norm", "Gradient norm", "norm, before clipping", True, 1.0),
    ("seconds", "Time of a step", "seconds", False, 1.0),
    ("memory_bytes", "Memory of the process", "GB resident", False, 1e-9),
    ("device_memory_bytes", "Peak memory of the GPU", "GB", False, 1e-9),
)
_NOT_METRICS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


def curves(runs: Sequence[Run]) -> list[Entry]:
    """Return a chart for each quantity logged at training steps, with a line for each run that logged the quantity."""
    charts = []
    for key, title, unit, logarithmic, factor in _CURVES:
        lines = [
            line(index, run.steps, key, factor)
            for index, run in enumerate(runs)
            if any(math.isfinite(number(entry.get(key))) for entry in run.steps)
        ]
        if lines:
            chart = {"id": key, "title": title, "x": "step", "y": unit, "log": logarithmic, "lines": lines}
            charts.append({**chart, "kind": "lines", "smooth": key == "loss", "note": _averaged(lines)})
    return charts


def metrics(runs: Sequence[Run]) -> list[Entry]:
    """Return a chart for each metric of the evaluations, with a line for each run that has the metric."""
    keys = sorted({key for run in runs for e in run.evaluations for key in e if key.startswith("eval_")})
    charts = []
    for key in keys:
        lines = [line(index, run.evaluations, key) for index, run in enumerate(runs)]
        lines = [one for one in lines if any(y is not None for y in one["y"])]
        if lines and key not in _NOT_METRICS:
            title = key.removeprefix("eval_").replace("_", " ")
            kind = "lines" if any(len(one["x"]) > 1 for one in lines) else "bars"
            chart = {"id": key, "kind": kind, "title": f"Evaluation: {title}", "x": "step", "y": title, "log": False}
            charts.append({**chart, "lines": lines, "smooth": False, "points": True, "note": ""})
    return charts


def predicted(runs: Sequence[Run]) -> list[Entry]:
    """Return a chart of predicted against true numbers; an empty list if no run predicted numbers."""
    lines: list[Entry] = []
    for index, run in enumerate(runs):
        pairs = [(number(one.get("label")), number(one.get("predicted"))) for one in run.examples]
        points = [pair for pair in pairs if not any(map(math.isnan, pair))]
        width = math.ceil(len(points) / MOST_POINTS) or 1
        shown = [[short(value) for value in values] for values in zip(*points[::width], strict=True)]
        if shown:
            lines.append({"run": index, "x": shown[0], "y": shown[1], "width": width})
    if not lines:
        return []
    most = max(one["width"] for one in lines)
    note = f"One of {most} evaluation examples is shown." if most > 1 else ""
    chart = {"id": "predicted", "kind": "points", "title": "Predicted against true", "x": "label", "y": "predicted"}
    return [{**chart, "lines": lines, "note": note}]


def line(run: int, entries: Sequence[Entry], key: str, factor: float = 1.0) -> Entry:
    """Return one value over the steps; more than ``MOST_POINTS`` values are averaged over groups of neighbours.

    A group is drawn at its last step. A group with a NaN in it is a gap in the line.
    """
    points = [(number(e.get("step")), number(e[key]) * factor) for e in entries if key in e]
    width = math.ceil(len(points) / MOST_POINTS) or 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return {
        "run": run,
        "x": [short(group[-1][0]) for group in groups],
        "y": [short(math.fsum(y for _, y in group) / len(group)) for group in groups],
        "width": width,
    }


def layers(updates: Sequence[Updates]) -> Entry | None:
    """Return norm, effective rank and spectrum of each layer's update, and λ and γ, for every run.

    All runs share one list of layers. The result is ``None`` if no run has an adapted layer.
    """
    names = sorted({layer.name for one in updates for layer in one.layers}, key=natural)
    if not names:
        return None
    places = {name: place for place, name in enumerate(names)}
    return {
        "names": names,
        "short": _without_common_start(names),
        "indices": {
            layer.spectrum.size: list(layer.spectrum.index) for one in updates for layer in one.layers if layer.spectrum
        },
        "runs": [_layers_of(index, one, places) for index, one in enumerate(updates) if one.layers],
    }


def _layers_of(index: int, updates: Updates, places: dict[str, int]) -> Entry:
    known = [(places[layer.name], layer.spectrum) for layer in updates.layers if layer.spectrum is not None]
    scalings = [(places[layer.name], layer.lam, layer.gamma) for layer in updates.layers if layer.lam is not None]
    return {
        "run": index,
        "layer": [place for place, _ in known],
        "norm": [short(found.norm) for _, found in known],
        "rank": [short(found.effective_rank) for _, found in known],
        "size": [found.size for _, found in known],
        "nonzero": [found.nonzero for _, found in known],
        "exact": all(found.exact for _, found in known),
        "spectra": [[short(value, 3) for value in found.values] for _, found in known],
        "scaled": [place for place, _, _ in scalings],
        "lam": [[short(value, 3) for value in lam or ()] for _, lam, _ in scalings],
        "gamma": [[short(value, 3) for value in gamma or ()] for _, _, gamma in scalings],
    }


def short(value: Any, digits: int = 4) -> float | int | None:
    """Return the value rounded to ``digits`` significant digits; ``None`` if the value is not a finite number."""
    exact = number(value)
    if math.isnan(exact):
        return None
    rounded = exact if exact.is_integer() and abs(exact) < 1e9 else float(f"{exact:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


def _averaged(lines: Sequence[Entry]) -> str:
    most = max(one["width"] for one in lines)
    return f"Each point is the mean of up to {most} logged steps." if most > 1 else ""


def _without_common_start(names: Sequence[str]) -> list[str]:
    """Return the names without their common start: ``0.output.dense`` for ``bert.encoder.layer.0.output.dense``."""
    parts = [name.split(".") for name in names]
    same = [len({own[i] for own in parts}) == 1 for i in range(min(map(len, parts)) - 1)]
    start = sum(accumulate(same, lambda a, b: a and b))
    return [".".join(own[start:]) for own in parts]
