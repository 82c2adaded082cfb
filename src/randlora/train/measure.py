"""Measurements of a run: time of a step, and memory."""

from __future__ import annotations

import resource
import sys
import time
from statistics import median
from typing import Any

import psutil
import torch
from transformers import TrainerCallback


class StepTimer(TrainerCallback):
    """A callback that measures each optimizer step, from its first forward to its update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Record the time of the step."""
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def median_seconds(self) -> float | None:
        """Median time of a step; ``None`` without a step."""
        return median(self.seconds) if self.seconds else None


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int:
    """Return the resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def device_memory_bytes() -> int:
    """Return the most memory that torch has allocated on the current GPU so far."""
    return int(torch.cuda.max_memory_allocated())
