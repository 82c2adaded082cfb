"""`python -m benchmarks [--quick] [names]`: runs benchmarks, prints their tables, writes benchmarks/results/*.json."""

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from . import files, record, step

BENCHMARKS = {"step": step, "files": files}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure randlora beside its peers.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds: under a minute")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")

    console = Console()
    for name in arguments.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        machine = record.this_machine()
        rows = benchmark.run(arguments.quick)
        console.print(table(name, benchmark.COLUMNS, rows))
        path = record.save(f"{name}-quick" if arguments.quick else name, rows, machine)
        console.print(f"written to {path}")


def table(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> Table:
    result = Table(title=title)
    for column in columns:
        result.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        result.add_row(*(cell(row[column]) for column in columns))
    return result


def cell(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    main()
