"""Rows as a table for the terminal."""

from typing import Any

from rich import box
from rich.table import Table


def table(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> Table:
    """Return a table with words to the left, numbers to the right, and a rule if columns before the method change."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        words = all(isinstance(row[column], str) for row in rows)
        result.add_column(column, justify="left" if words else "right", no_wrap=words)
    before = columns[: columns.index("method")] if "method" in columns else ()
    groups = [[row[column] for column in before] for row in rows]
    for row, group, following in zip(rows, groups, [*groups[1:], []], strict=True):
        result.add_row(*(cell(row[column]) for column in columns), end_section=group != following)
    return result


def cell(value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 0.1 else f"{value:,.2f}"
