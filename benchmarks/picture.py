"""The picture of `scaling`, by matplotlib."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from randlora.tuner.files.atomic import write_atomically

from .methods import DENSE, FROZEN, FULL, LORA, PEFT_DENSE, VERY_SPARSE

# Okabe and Ito's colours as in randlora.report.figures; line styles and markers distinguish the lines without colour.
STYLES = {
    PEFT_DENSE: ("#CC79A7", "--", "s"),
    DENSE: ("#D55E00", "-", "o"),
    VERY_SPARSE: ("#E69F00", "-", "D"),
    FULL: ("#009E73", "-.", "^"),
    LORA: ("#0072B2", "--", "v"),
    FROZEN: ("#7A7A7A", ":", "x"),
}
AXES = {
    "tokens": ("µs per token", "Time per token against tokens", "tokens in the batch"),
    "hidden": ("× frozen", "Step against hidden size", "hidden size"),
    "layers": ("seconds", "Step against depth", "layers"),
}
"""Column to draw, title, and label of the x axis, for each quantity that grows."""
UNITS = {"× frozen": "multiple of the frozen step", "seconds": "seconds per step"}


def draw(path: Path, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """Draw one panel for each quantity that grows, as a PNG of 2,080 pixels' width.

    Args:
        path: file to write.
        rows: rows measured while a quantity grew, by quantity.
    """
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 4.4), dpi=160, layout="constrained")
        panels = figure.subplots(1, len(AXES))
        for axes, (quantity, (drawn, title, label)) in zip(panels, AXES.items(), strict=True):
            _panel(axes, rows[quantity], quantity, drawn)
            axes.set_title(title, loc="left")
            axes.set_xlabel(label)
            axes.set_ylabel(UNITS.get(drawn, drawn))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _panel(axes: Axes, rows: list[dict[str, Any]], quantity: str, drawn: str) -> None:
    """Draw lines over an axis that names the measured points, with heights from zero so that they compare."""
    for method, points in _lines(rows, quantity, drawn):
        color, style, marker = STYLES[method]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=color, linestyle=style, marker=marker, markersize=5, linewidth=2, label=method)
    if quantity != "layers":  # which a straight line shows best
        axes.set_xscale("log", base=2)
    ticks = sorted({row[quantity] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def _lines(rows: list[dict[str, Any]], quantity: str, drawn: str) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    for method in STYLES:
        points = sorted((row[quantity], row[drawn]) for row in rows if row["method"] == method)
        if points:
            yield method, points
