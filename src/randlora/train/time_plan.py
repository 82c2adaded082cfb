"""The plan of a comparison within its minutes, computed from measured costs."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from transformers import TrainerCallback

from randlora.analysis.counts import lora_rank_of
from randlora.errors import ConfigError
from randlora.train.search import steps_of
from randlora.train.settings import TrainSettings
from randlora.train.short_run import MOST_SELECTED, short_run, shortened, whole_examples
from randlora.tuner.layers.base import adapted

MOST_SEEDS, LEAST_SEEDS = 5, 3  # fewer give a poor spread; more cost too much
RATES = 4  # planned for a search: after three, the first can be between two worse ones
_LEAST_STEPS = 20  # of a run, if the settings ask for as many: fewer do not tell methods apart
_PROBE_STEPS = 4


@dataclass(frozen=True)
class Cost:
    """The cost of one method on this machine.

    Attributes:
        trainable: number of values that train, the head included.
        whole_run: optimizer steps of a run by the settings.
        load: seconds to load data and model.
        step: seconds of a training step.
        example: seconds to evaluate a row of the data, which may be a part of a chunk or several.
        lora_rank: rank of the LoRA that trains about as many values; only for RandLoRA.
    """

    trainable: int
    whole_run: int
    load: float
    step: float
    example: float
    lora_rank: int | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of a comparison.

    Attributes:
        steps: steps of each run.
        whole_run: steps of a run by the settings; more than ``steps`` where the time is too short for these.
        search_steps: steps of each short run of a search.
        seeds: runs of each method.
        search_seconds: planned time of the searches of all methods.
        start_seconds: time to start the processes of the first runs, which measure the peak memory.
        round_seconds: planned time of one seed for all methods.
        minutes_for_whole: time of the comparison with runs of full length.
    """

    steps: int
    whole_run: int
    search_steps: int
    seeds: int
    search_seconds: float
    start_seconds: float
    round_seconds: float
    minutes_for_whole: float

    @property
    def seconds(self) -> float:
        """Planned time of the whole comparison."""
        return self.search_seconds + self.start_seconds + self.seeds * self.round_seconds


class Times:
    """The durations of searches and runs, for methods of given costs.

    Args:
        costs: cost of each method.
        start: seconds that a process takes to start.
        selection: examples that a search evaluates.
        test: examples that a run is tested on.
    """

    def __init__(self, costs: Sequence[Cost], start: float, selection: int, test: int) -> None:
        self.costs, self.start, self.selection, self.test = costs, start, selection, test

    def of(self, cost: Cost) -> Times:
        """Return the durations for one method alone."""
        return Times([cost], self.start, self.selection, self.test)

    def search(self, steps: int) -> float:
        """Return the seconds of all searches with runs of ``steps``."""
        return sum(RATES * (one.load + steps * one.step + 2 * self.selection * one.example) for one in self.costs)

    def run(self, cost: Cost, steps: int) -> float:
        """Return the seconds of one run in a process that has started."""
        return cost.load + steps * cost.step + self.test * cost.example

    def round(self, steps: int) -> float:
        """Return the seconds of one run of each method."""
        return sum(self.run(one, steps) for one in self.costs)


def make_plan(times: Times, seconds: float) -> Plan:
    """Return a plan: the longest runs that fit, up to the settings' own, then most seeds, then the longest searches.

    The short runs of a search have at least a quarter of a run's steps: shorter runs would find rates for another
    length.

    Args:
        times: durations on this machine.
        seconds: time for the comparison.

    Raises:
        ConfigError: if even the shortest runs do not fit.
    """
    whole = max(one.whole_run for one in times.costs)
    starts = times.start * len(times.costs)

    def needed(steps: int, seeds: int) -> float:
        return times.search(_least_search(steps)) + starts + seeds * times.round(steps)

    fitting = [steps for steps in range(min(_LEAST_STEPS, whole), whole + 1) if needed(steps, LEAST_SEEDS) <= seconds]
    if not fitting:
        least = needed(min(_LEAST_STEPS, whole), LEAST_SEEDS)
        raise ConfigError(
            f"minutes: {max(seconds, 0) / 60:.1f} are left after the measurement, and {LEAST_SEEDS} seeds of "
            f"{min(_LEAST_STEPS, whole)} steps of {len(times.costs)} methods take {least / 60:.1f}. Give more minutes, "
            "fewer methods or ranks, or smaller batches"
        )
    steps = fitting[-1]
    seeds = max(n for n in range(LEAST_SEEDS, MOST_SEEDS + 1) if n == LEAST_SEEDS or needed(steps, n) <= seconds)
    left = seconds - starts - seeds * times.round(steps)
    search_steps = max(
        n for n in range(_least_search(steps), steps + 1) if n == _least_search(steps) or times.search(n) <= left
    )
    return Plan(
        steps=steps,
        whole_run=whole,
        search_steps=search_steps,
        seeds=seeds,
        search_seconds=times.search(search_steps),
        start_seconds=starts,
        round_seconds=times.round(steps),
        minutes_for_whole=math.ceil(needed(whole, LEAST_SEEDS) / 60),
    )


def measure_cost(settings: TrainSettings) -> Cost:
    """Return the cost of a method: load data and model, take a few steps, evaluate, and measure the time of each.

    Raises:
        ConfigError: if the method cannot be applied to the model.
    """
    begin, clock = time.perf_counter(), _Clock()
    short = shortened(settings, _PROBE_STEPS).model_copy(update={"eval_steps": None})
    with short_run(short, [clock]) as (run, trainer):
        load = time.perf_counter() - begin
        trainer.train()
        begin = time.perf_counter()
        trainer.evaluate()
        example = (time.perf_counter() - begin) / min(len(run.data.evaluation), MOST_SELECTED)
        whole = steps_of(settings, whole_examples(trainer))
        rank = _lora_rank(run.model) if settings.method == "randlora" else None
        return Cost(run.trainable_parameters, whole, load, clock.seconds, example, rank)


def seconds_to_start() -> float:
    """Return the seconds until a new process can load a model."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import randlora.train.run"], stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def _least_search(steps: int) -> int:
    return min(steps, max(_LEAST_STEPS, math.ceil(steps / 4)))


def _lora_rank(model: Any) -> int:
    """Return the rank of the LoRA on the same layers whose number of values is nearest."""
    layers = adapted(model.base_model.model).values()
    shapes = [(one.in_features, one.out_features) for one in layers for _ in range(one.num_matrices)]
    ours = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "randlora_" in name)
    return lora_rank_of(shapes, ours)


class _Clock(TrainerCallback):
    """A callback that measures the time from one step's end to the next, including the time to fetch the batch."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Record the time."""
        self._ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Median time of a step, without the first one."""
        return median(b - a for a, b in zip(self._ends, self._ends[1:], strict=False))
