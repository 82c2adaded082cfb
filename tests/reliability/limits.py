"""Bounds on what code under test may take from the machine; nothing passes or fails by how fast it is."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Hanging(BaseException):
    """Nothing catches it on the way."""


@contextmanager
def bounded(more_bytes: int = 2**30, seconds: int = 60) -> Iterator[None]:
    """Within the context ``more_bytes`` of memory can be had beyond what is held, and a hang of ``seconds`` ends."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)

    def end(*_arguments: object) -> None:
        raise Hanging

    handler = signal.signal(signal.SIGALRM, end)
    resource.setrlimit(resource.RLIMIT_AS, (held + more_bytes, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
