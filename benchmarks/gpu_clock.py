"""Time and memory of work on a device, and the rates for its floor."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch


class Times(NamedTuple):
    """The milliseconds of a run, and those until the host had launched all of it: the run's if the host limits it."""

    whole: float
    host: float


def timed(work: Callable[[], object], device: torch.device) -> Times:
    """Return the times of one run, of which the first ends with the device."""
    waited(device)
    start = time.perf_counter()
    work()
    host = time.perf_counter() - start
    waited(device)
    return Times(1e3 * (time.perf_counter() - start), 1e3 * host)


def milliseconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median of ``rounds`` runs after two for warm-up, by the device's events where it has them."""
    for _ in range(2):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
        return median(times)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start_mark, end_mark in marks:
        start_mark.record()
        work()
        end_mark.record()
    waited(device)
    return median(first.elapsed_time(last) for first, last in marks)


def waited(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device.

    Attributes:
        products: multiply-adds a second of a large product in bf16, by torch.
        memory: bytes a second, read and written, of a large copy.
    """

    products: float
    memory: float

    def floor(self, multiply_adds: float, nbytes: float) -> float:
        """Return the least number of milliseconds for so much work and traffic."""
        return 1e3 * max(multiply_adds / self.products, nbytes / self.memory)


def measured_rates(device: torch.device, small: bool) -> Rates:
    size, length = (256, 1 << 20) if small else (8192, 1 << 29)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    products = size**3 / milliseconds(lambda: a @ b, device, 10)
    source = torch.empty(length, device=device, dtype=torch.bfloat16).zero_()
    target = torch.empty_like(source)
    memory = 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device, 10)
    return Rates(1e3 * products, 1e3 * memory)
