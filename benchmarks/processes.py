"""Processes of their own, for what must not see what was measured before: imports, caches, the peak of memory."""

import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def fresh_processes(tasks: int | None = 1, workers: int = 1) -> Iterator[ProcessPoolExecutor]:
    """Runs each task in a new process, forked from a server that has imported PEFT and nothing of randlora.

    The server, one for all benchmarks, spares each process the slowest imports. With ``tasks=None`` all tasks run in
    the same processes, ``workers`` of them, which keep what tasks leave in their modules.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.models", "peft"])
    with ProcessPoolExecutor(
        max_workers=workers,
        mp_context=context,
        max_tasks_per_child=tasks,
        initializer=warnings.simplefilter,  # PEFT's advice on save_projection
        initargs=("ignore",),
    ) as processes:
        yield processes
