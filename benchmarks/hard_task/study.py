"""The runs of the study, found step by step: if the best rate is at an edge, the next rate is tried too."""

import json
import math
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from pathlib import Path
from typing import Any

from .methods import METHODS, Method
from .runs import Run, outcome
from .settings import Task, name_of

Results = Mapping[Run, dict[str, Any]]
BELOW, ABOVE = 1, 2  # rates that are tried beyond the best one, at the least


def complete(task: Task, folder: Path, pool: Executor, workers: int) -> dict[Run, dict[str, Any]]:
    """Run all runs that the folder lacks, as many at a time as there are workers, and return all results."""
    results = load(file_of(task, folder))
    running: dict[Future[dict[str, Any]], Run] = {}
    while True:
        for run in wanted(task, results):
            if len(running) < workers and run not in results and run not in running.values():
                running[pool.submit(outcome, run, task, folder)] = run
        if not running:
            return results
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            results[running.pop(future)] = future.result()
            append(file_of(task, folder), future.result())


def wanted(task: Task, results: Results) -> Iterator[Run]:
    """Yield the runs that are known to be needed, done or not, the most telling first."""
    rivals = [cell for cell in cells(task) if not METHODS[cell[0]].variant]
    variants = [cell for cell in cells(task) if METHODS[cell[0]].variant]
    first = [cell for cell in rivals if cell[1] in (0, task.ranks[0])]
    for name, r in first:
        yield from (Run(name, r, rate, 0) for rate in METHODS[name].rates[1:3])
    for part in (first, variants[:2], [cell for cell in rivals if cell not in first], variants[2:]):
        for name, r in part:
            yield from (Run(name, r, rate, 0) for rate in rates(name, r, results))
        for name, r in part:
            best = settled(name, r, results)
            if best is not None:
                yield from (Run(name, r, best, seed) for seed in range(1, task.seeds))


def cells(task: Task) -> list[tuple[str, int]]:
    """Return each method with each of its budgets."""
    return [(name, r) for r in (0, *task.ranks) for name, method in METHODS.items() if r in budgets(method, task)]


def budgets(method: Method, task: Task) -> tuple[int, ...]:
    if not method.budgeted:
        return (0,)
    return tuple(r for r in task.ranks[: 1 if method.variant else None] if r >= method.least_r)


def rates(name: str, r: int, results: Results) -> list[float]:
    """Return the rates to try with the first seed: the method's own, and more while the best is too near an edge."""
    own = list(METHODS[name].rates)
    while True:
        tried = {rate: results.get(Run(name, r, rate, 0)) for rate in own}
        if None in tried.values():
            return own
        place = min(range(len(own)), key=lambda index: loss(tried[own[index]]))
        if place < BELOW:
            own.insert(0, own[0] / 2)
        elif place + ABOVE >= len(own):
            own.append(own[-1] * 2)
        else:
            return own


def settled(name: str, r: int, results: Results) -> float | None:
    """Return the best rate, once all rates for its choice have been tried."""
    tried = {rate: results.get(Run(name, r, rate, 0)) for rate in rates(name, r, results)}
    return None if None in tried.values() else min(tried, key=lambda rate: loss(tried[rate]))


def finished(task: Task, results: Results) -> list[tuple[str, int]]:
    """Return the methods with their budgets for which all runs are done."""
    best = {cell: settled(*cell, results) for cell in cells(task)}
    return [
        (name, r)
        for (name, r), rate in best.items()
        if rate is not None and all(Run(name, r, rate, seed) in results for seed in range(task.seeds))
    ]


def loss(result: dict[str, Any] | None) -> float:
    """Return bits per byte on source, infinite for a run that ended without a number."""
    return math.inf if result is None or result["source"] is None else result["source"]


def file_of(task: Task, folder: Path) -> Path:
    """Return the file with one line for each run; the source differs from one Python to the next."""
    return folder / f"runs-{name_of(task)}-python-{platform.python_version()}.jsonl"


def load(path: Path) -> dict[Run, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Run(row["method"], row["r"], row["rate"], row["seed"]): row for row in rows}


def append(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")
