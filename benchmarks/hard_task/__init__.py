"""A task that needs updates of high rank: a language model on bytes goes from English reviews to Python's source code.

The model, a GPT-2 of 1.15 million parameters, reads English once; its weights are kept in build/hard_task/. Every
method then adapts it to source with the same batches, at two budgets of trainable values, each at learning rates around
its best one, and with three seeds there. Held-out text shows the quality (source) and the forgetting (English).

Each finished run is a line of a file in build/hard_task/, and is not repeated. One run goes on for each core that the
process may use (`taskset -c 0 python -m benchmarks hard_task` for one).
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..processes import fresh_processes
from .cost import costs
from .model import FOLDER
from .runs import untouched
from .settings import QUICK, STUDY, Task
from .study import complete, finished
from .summary import COLUMNS, rows

__all__ = ["COLUMNS", "run"]


def run(quick: bool) -> Iterator[dict[str, Any]]:
    if not quick:
        yield from rows_of(STUDY, FOLDER, rounds=15)
        return
    with tempfile.TemporaryDirectory() as folder:  # so that all runs are done again
        yield from rows_of(QUICK, Path(folder), rounds=1)


def rows_of(task: Task, folder: Path, rounds: int) -> list[dict[str, Any]]:
    workers = cores()
    with fresh_processes(tasks=None, workers=workers) as pool:
        before = pool.submit(untouched, task, folder).result()
        results = complete(task, folder, pool, workers)
    with fresh_processes() as pool:  # alone, for timing
        cost = pool.submit(costs, task, folder, rounds, finished(task, results)).result()
    return rows(task, results, cost, before)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
