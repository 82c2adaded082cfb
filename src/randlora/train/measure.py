"""What a run cost: time per step and memory."""

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
    """Measures each optimizer step from its first forward to its update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Starts the watch."""
        self._start = time.perf_counter()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Reads the watch."""
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def median_seconds(self) -> float | None:
        """Median over all steps, ``None`` if there were none."""
        return median(self.seconds) if self.seconds else None


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far (resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int:
    """The memory that this process holds now (resident set)."""
    return int(psutil.Process().memory_info().rss)


def device_memory_bytes() -> int:
    """The most memory that torch has held on the current GPU so far."""
    return int(torch.cuda.max_memory_allocated())
