"""Programs in fresh processes that need not import torch again: forked from one that has, and does nothing else."""

import multiprocessing
import os
import traceback
from pathlib import Path

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "transformers", "peft"])


def run(program: str, name: str, folder: Path) -> str:
    """Runs a program in a folder and returns the traceback of what failed, or nothing.

    Args:
        program: Python source.
        name: of the file that tracebacks name.
        folder: empty; what the program prints is left in it.
    """
    process = FORKSERVER.Process(target=_execute, args=(program, name, folder))
    process.start()
    process.join()
    fault = folder / "traceback"
    return fault.read_text() if fault.exists() else "" if process.exitcode == 0 else f"exit code {process.exitcode}"


def _execute(program: str, name: str, folder: Path) -> None:
    os.chdir(folder)
    printed = os.open("printed", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(printed, stream)
    try:
        exec(compile(program, name, "exec"), {"__name__": "__main__"})
    except BaseException:
        Path(folder, "traceback").write_text(traceback.format_exc())
        raise
