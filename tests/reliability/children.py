"""Work in forked processes, which are killed, run out of space or may not write."""

import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import hypothesis
from tqdm import tqdm

SLOW = hypothesis.settings.get_current_profile_name() == "slow"
NOBODY = 65534


def start(work: Callable[[], object]) -> int:
    """A process that does ``work`` and ends with 0, or with 1 and a traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        tqdm.set_lock(threading.RLock())  # forked processes share its usual one: who is killed holds it forever
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended_well(process: int) -> bool:
    return os.waitpid(process, 0)[1] == 0


def seconds_of(work: Callable[[int], object]) -> float:
    """The shorter of two runs, ``work(0)`` and ``work(1)``: a first one may read files that the next ones find read."""
    taken = []
    for number in (0, 1):
        begin = time.monotonic()
        assert ended_well(start(lambda number=number: work(number)))
        taken.append(time.monotonic() - begin)
    return min(taken)


def killed(work: Callable[[], object], within: float) -> bool:
    """Kills a process that does ``work`` at a random moment of the time; says whether it was still at it."""
    process = start(work)
    time.sleep(random.uniform(0, within))
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def without_space(work: Callable[[], object], bytes_left: int = 1000) -> Callable[[], None]:
    """``work``, where no file may grow beyond so many bytes."""

    def limited() -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # files too, where the tests' output goes to one
            os.dup2(nowhere, stream)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))
        work()

    return limited


def without_rights(work: Callable[[], object]) -> Callable[[], None]:
    """``work`` as a user whom permissions bind."""

    def bound() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    return bound
