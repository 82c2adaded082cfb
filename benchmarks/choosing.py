"""`python -m benchmarks.choosing`: the picture and the tables of docs/choosing.md, from the results of `sweep`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from randlora.tuner.files.atomic import write_atomically

from .record import RESULTS

Row = dict[str, Any]
PICTURE = RESULTS.parents[1] / "docs" / "images" / "choosing.png"
STYLES = {
    "RandLoRA, α/r = 20": ("#D55E00", "-", "o"),
    "RandLoRA, paper's scaling": ("#CC79A7", "--", "D"),
    "LoRA": ("#0072B2", "--", "v"),
    "full fine-tuning": ("#009E73", "-.", "^"),
}
"""Okabe and Ito's colours, as in `picture`."""
CHANCE = {"accuracy %": 50.0, "neighbours kept %": 1.0}
TITLES = {"accuracy %": "Accuracy on 3,530 sentences, %", "neighbours kept %": "Neighbours kept, %"}

METHODS: Mapping[str, dict[str, Any]] = {
    "RandLoRA, α/r = 20": {"method": "randlora", "bases": "dense", "scaling": "peft", "r": 32, "alpha/r": 20.0},
    "RandLoRA, paper's scaling": {"method": "randlora", "scaling": "paper"},
    "LoRA": {"method": "lora", "r": 5},
    "full fine-tuning": {"method": "full"},
    "head alone": {"method": "head"},
}
"""Values that select the rows of each method at several learning rates."""
_AT_ONE_RATE = {"method": "randlora", "scaling": "peft", "learning rate": "0.0003"}
OTHERS: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "alpha": ({**_AT_ONE_RATE, "bases": "dense", "r": 32}, ("alpha/r",)),
    "r": ({**_AT_ONE_RATE, "bases": "dense", "alpha/r": 20.0}, ("r", "trainable")),
    "r of LoRA": ({"method": "lora", "learning rate": "0.001"}, ("r", "trainable")),
    "bases": ({**_AT_ONE_RATE, "r": 32, "alpha/r": 20.0}, ("bases",)),
}
"""Values that select the rows of each table, and the columns that grow in it."""


def rows_of(wanted: dict[str, Any], order: str, rows: list[Row]) -> list[Row]:
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return found if order == "bases" else sorted(found, key=lambda row: float(row[order]))


def tables(rows: list[Row]) -> dict[str, str]:
    """Return the tables of the page in Markdown, by name."""
    by_rate = [
        [name, row["learning rate"], *_results(row)]
        for name, wanted in METHODS.items()
        for row in rows_of(wanted, "learning rate", rows)
    ]
    found = {"learning rate": _markdown(("method", "learning rate"), by_rate)}
    for name, (wanted, shown) in OTHERS.items():
        lines = [[_cell(row[column]) for column in shown] + _results(row) for row in rows_of(wanted, shown[0], rows)]
        found[name] = _markdown(shown, lines)
    return found


def _markdown(columns: tuple[str, ...], lines: list[list[str]]) -> str:
    head = [*columns, "accuracy (95%)", "neighbours kept"]
    words = "method" in columns or "bases" in columns
    rule = ["---" if words else "---:", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def _results(row: Row) -> list[str]:
    if row["accuracy %"] is None:
        return ["loss no number", ""]
    interval = f"{row['accuracy %']:.1f}% ({row['from %']:.1f}–{row['to %']:.1f})"
    return [interval, f"{row['neighbours kept %']:.0f}%"]


def draw(path: Path, rows: list[Row]) -> None:
    """Draw accuracy and forgetting against the learning rate, as a PNG of 1,600 pixels' width."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4.2), dpi=160, layout="constrained")
        for axes, column in zip(figure.subplots(1, 2), TITLES, strict=True):
            _panel(axes, column, rows)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _panel(axes: Axes, column: str, rows: list[Row]) -> None:
    for name, (color, style, marker) in STYLES.items():
        found = [row for row in rows_of(METHODS[name], "learning rate", rows) if row[column] is not None]
        x = [float(row["learning rate"]) for row in found]
        y = [row[column] for row in found]
        axes.plot(x, y, color=color, linestyle=style, marker=marker, markersize=5, linewidth=2, label=name)
        if column == "accuracy %":
            axes.fill_between(x, [r["from %"] for r in found], [r["to %"] for r in found], color=color, alpha=0.12)
    axes.axhline(CHANCE[column], color="#7A7A7A", linestyle=":", linewidth=1.5, label="chance")
    axes.set_xscale("log")
    axes.set_title(TITLES[column], loc="left")
    axes.set_xlabel("learning rate")
    axes.grid(alpha=0.25)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    rows = json.loads((RESULTS / "sweep.json").read_text(encoding="utf-8"))["rows"]
    for name, text in tables(rows).items():
        print(f"{name}\n\n{text}\n")
    draw(PICTURE, rows)
    print(f"drawn as {PICTURE}")


if __name__ == "__main__":
    main()
