"""How long the demo takes on this machine, how many sentences fit into the time that it has, and what is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

BATCH = 32
SECONDS = 480.0  # of the ten minutes: the rest is for a machine that gets busier


@dataclass(frozen=True)
class DemoSize:
    """How much of the data the demo uses."""

    train: int
    test: int


WHOLE = DemoSize(train=4000, test=1000)
QUICK = DemoSize(train=320, test=200)


@dataclass(frozen=True)
class Pace:
    """What the first steps have cost.

    Attributes:
        start: seconds of a process besides its steps: imports, data, evaluation, saving.
        step: seconds of a step of RandLoRA.
    """

    start: float
    step: float

    def seconds(self, size: DemoSize, shares: Sequence[float]) -> float:
        """Of a demo of ``size``, whose parts take ``shares`` of the steps of RandLoRA, each in a process of its own."""
        return len(shares) * self.start + sum(shares) * self.step * size.train / BATCH

    def fitting(self, seconds: float, shares: Sequence[float]) -> DemoSize:
        """The largest size that takes no longer, in steps of ten batches; ``QUICK`` at least and ``WHOLE`` at most."""
        steps = (seconds - len(shares) * self.start) / (sum(shares) * self.step)
        train = int(steps * BATCH) // (10 * BATCH) * 10 * BATCH
        train = WHOLE.train if steps * BATCH >= WHOLE.train else max(train, QUICK.train)
        return DemoSize(train, max(train // 4, QUICK.test))


class Clock:
    """The time left for all parts of something, in words.

    Args:
        expected: seconds of each part, or numbers in proportion to them.
        exact: whether they are seconds, so that something can be said before the first has ended.
    """

    def __init__(self, expected: Sequence[float], exact: bool) -> None:
        self._expected, self._exact, self._start = list(expected), exact, time.monotonic()

    def left(self, done: int) -> str:
        """After so many parts; as the parts before took longer or shorter than expected, so will the rest."""
        rest = sum(self._expected[done:])
        if done:
            rest *= (time.monotonic() - self._start) / sum(self._expected[:done])
        elif not self._exact:
            return ""
        return f", about {minutes(rest)} left for all"


def minutes(seconds: float) -> str:
    """Whole minutes as people say them."""
    count = max(round(seconds / 60), 1)
    return f"{count} minute{'' if count == 1 else 's'}"
