"""The comparison of several methods as a table, in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from randlora.report.statistics import wilson_interval
from randlora.text import byte_text

_COLUMNS = ("method", "trainable", "accuracy (95%)", "s/step", "peak memory", "saved")


@dataclass(frozen=True)
class Row:
    """The result of one method.

    Attributes:
        method: name of the method.
        trainable: number of trainable parameters.
        correct: number of correctly classified test examples.
        tested: number of test examples.
        seconds_per_step: median time of a training step.
        peak_memory_bytes: peak memory of the run's process.
        saved_bytes: size of the saved files.
    """

    method: str
    trainable: int
    correct: int
    tested: int
    seconds_per_step: float
    peak_memory_bytes: int
    saved_bytes: int

    def cells(self) -> list[str]:
        """Return the cells of the row as text."""
        low, high = wilson_interval(self.correct, self.tested)
        return [
            self.method,
            f"{self.trainable:,}",
            f"{self.correct / self.tested:.1%} ({100 * low:.1f}–{100 * high:.1f})",
            f"{self.seconds_per_step:.2f}",
            byte_text(self.peak_memory_bytes),
            byte_text(self.saved_bytes),
        ]


def terminal_table(rows: list[Row], title: str) -> Table:
    """Return the table for the terminal."""
    table = Table(title=title, box=box.SIMPLE_HEAVY, title_justify="left", padding=(0, 1, 0, 0))
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    return table


def markdown_table(rows: list[Row]) -> str:
    """Return the table in Markdown."""
    return markdown(_COLUMNS, [row.cells() for row in rows])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown. The first column is aligned to the left, the others to the right."""
    lines = [columns, ("---", *["---:"] * (len(columns) - 1)), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
