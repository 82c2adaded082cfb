"""`python -m benchmarks [--quick] [names]`: run benchmarks, print their tables, write benchmarks/results/*.json."""

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Sequence

from rich.console import Console
from transformers.utils import logging

from . import record
from .table import table

NAMES = (
    "step",
    "step_bf16",
    "architectures",
    "compiled",
    "overhead",
    "structured",
    "layers",
    "crossover",
    "memory",
    "files",
    "bases",
    "switching",
    "decode",
    "scaling",
    "plan",
)
"""Benchmarks by name of file; each file has the `COLUMNS` of its table, and a `run(quick)` that yields the rows."""

ON_REQUEST = ("gpu_resources", "sweep", "hard_task", "reach", "serving")
"""Benchmarks that run only if named: they need more than the others, or measure trained models."""

KNOWN = (*NAMES, *ON_REQUEST)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure randlora beside its peers.")
    note = f"of {', '.join(KNOWN)}; by default all but {', '.join(ON_REQUEST)}"
    parser.add_argument("names", nargs="*", metavar="name", help=note)
    parser.add_argument("--quick", action="store_true", help="small models and few rounds: under a minute for all")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(KNOWN)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(KNOWN)}")

    for name in options.names or NAMES:
        # no column is cut in a file or a pipe
        measure(name, options.quick, Console(width=None if sys.stdout.isatty() else 160))


def measure(name: str, quick: bool, console: Console) -> None:
    benchmark = importlib.import_module(f"{__package__}.{name}")
    machine, start, rows = record.this_machine(), time.perf_counter(), []
    with console.status(name) as status:
        for row in benchmark.run(quick):
            rows.append(row)
            status.update(f"{name}: {len(rows)} rows, {time.perf_counter() - start:.0f} s")
    console.print(table(name, benchmark.COLUMNS, rows))
    path = record.save(f"{name}-quick" if quick else name, rows, machine, time.perf_counter() - start)
    console.print(f"written to {path}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # PEFT's advice on save_projection, fan_in_fan_out
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main()
