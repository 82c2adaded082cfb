"""Fresh processes for measurements that earlier ones would disturb by imports, caches or the peak of memory."""

import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def fresh_processes(tasks: int | None = 1, workers: int = 1) -> Iterator[ProcessPoolExecutor]:
    """Open an executor that runs each task in a new process, forked from a server with PEFT but without randlora.

    The server, one for all benchmarks, saves each process the slowest imports. With ``tasks=None`` all tasks run in
    the same ``workers`` processes, which keep the state of their modules between tasks.
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
