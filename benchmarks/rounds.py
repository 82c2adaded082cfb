"""Times of actions in turn, round after round, and their ratios.

All actions run once in each round, so that a disturbance of the machine affects all of them alike. A comparison is the
median over rounds of the ratio of two times of the same round.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median

Seconds = Mapping[str, float]
"""Seconds of one round, by action."""


def interleave(
    actions: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[Seconds]:
    return [{name: seconds(action, clock) for name, action in actions.items()} for _ in range(rounds)]


def seconds(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    action()
    return clock() - start


def typical(history: list[Seconds], name: str) -> float:
    return median(times[name] for times in history)


def ratio(history: list[Seconds], name: str, to: str) -> float:
    return median(times[name] / times[to] for times in history)


def added_ratio(history: list[Seconds], name: str, peer: str, floor: str) -> float:
    """Return the time of ``name`` beyond ``floor``, as a share of the time of ``peer`` beyond ``floor``."""
    return median((times[name] - times[floor]) / (times[peer] - times[floor]) for times in history)
