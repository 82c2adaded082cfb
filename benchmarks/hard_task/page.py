"""`python -m benchmarks.hard_task.page`: the tables of docs/hard_task.md, from the results of `hard_task`."""

import json
from typing import Any

from ..record import RESULTS
from ..table import cell
from .methods import METHODS
from .summary import COLUMNS, Row

FILE = RESULTS / "hard_task.json"
WORDS = ("method", "rates within 0.1")


def tables(rows: list[Row]) -> dict[str, str]:
    """Return the tables of the page in Markdown, by name."""
    shown: dict[str, list[Row]] = {}
    for variant in (False, True):
        for row in rows:
            if _is_variant(row) == variant:
                shown.setdefault(f"variants, {row['budget']}" if variant else row["budget"], []).append(row)
    return {
        **{name: _markdown(list(COLUMNS[1:]), list(map(_cells, part))) for name, part in shown.items()},
        "rates": _markdown(["budget", "method", "source by rate"], list(map(_by_rate, rows[1:]))),
    }


def _is_variant(row: Row) -> bool:
    return row["method"] in METHODS and METHODS[row["method"]].variant


def _cells(row: Row) -> list[str]:
    return [cell(row[column]) for column in COLUMNS[1:]]


def _by_rate(row: Row) -> list[str]:
    """Return every rate's result with the first seed."""
    told = [f"{run['rate']:g}: {_bits(run['source'])}" for run in row["runs"] if run["seed"] == 0]
    return [row["budget"], row["method"], ", ".join(told)]


def _bits(value: float | None) -> str:
    return "no number" if value is None else f"{value:.3f}"


def _markdown(columns: list[str], lines: list[list[str]]) -> str:
    words = {0, *(index for index, column in enumerate(columns) if column in WORDS or column == "source by rate")}
    rule = ["---" if index in words else "---:" for index in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *lines))


def main() -> None:
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["rows"]
    for name, text in tables(rows).items():
        print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    main()
