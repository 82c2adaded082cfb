"""The duration of the demo on this machine, the number of sentences that fit, and the time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

BATCH = 32
SECONDS = 480.0  # the rest of the ten minutes is for a machine that gets busier


@dataclass(frozen=True)
class DemoSize:
    """The numbers of sentences that the demo uses."""

    train: int
    test: int


WHOLE = DemoSize(train=4000, test=1000)
QUICK = DemoSize(train=320, test=200)


@dataclass(frozen=True)
class Pace:
    """The cost of the first steps.

    Attributes:
        start: seconds of a process besides its steps: imports, data, evaluation, saving.
        step: seconds of a step of RandLoRA.
    """

    start: float
    step: float

    def seconds(self, size: DemoSize, shares: Sequence[float]) -> float:
        """Return the seconds of a demo of ``size``; each part has a process, and its share of the steps' time."""
        return len(shares) * self.start + sum(shares) * self.step * size.train / BATCH

    def fitting(self, seconds: float, shares: Sequence[float]) -> DemoSize:
        """Return the largest size within ``seconds``, in steps of ten batches, from ``QUICK`` to ``WHOLE``."""
        steps = (seconds - len(shares) * self.start) / (sum(shares) * self.step)
        train = int(steps * BATCH) // (10 * BATCH) * 10 * BATCH
        train = WHOLE.train if steps * BATCH >= WHOLE.train else max(train, QUICK.train)
        return DemoSize(train, max(train // 4, QUICK.test))


class Clock:
    """The time left for all parts of a task, in words.

    Args:
        expected: seconds of each part, or numbers in proportion to the seconds.
        exact: whether ``expected`` is in seconds, so that the time left is known before the first part has ended.
    """

    def __init__(self, expected: Sequence[float], exact: bool) -> None:
        self._expected, self._exact, self._start = list(expected), exact, time.monotonic()

    def left(self, done: int) -> str:
        """Return the time left after ``done`` parts, scaled by the duration of these parts over the expected one."""
        rest = sum(self._expected[done:])
        if done:
            rest *= (time.monotonic() - self._start) / sum(self._expected[:done])
        elif not self._exact:
            return ""
        return f", about {minutes(rest)} left for all"


def minutes(seconds: float) -> str:
    """Return whole minutes in words."""
    count = max(round(seconds / 60), 1)
    return f"{count} minute{'' if count == 1 else 's'}"
