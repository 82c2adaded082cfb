"""One run, of a method with a budget, a learning rate and a seed, and its figures."""

import itertools
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from . import data
from .methods import METHODS, Method
from .model import Groups, bits_per_byte, pretrained, reading, train
from .settings import Task


@dataclass(frozen=True)
class Run:
    """A run. ``r`` is RandLoRA's at the budget; 0 for methods that run once, with their own number of values."""

    method: str
    r: int
    rate: float
    seed: int


def outcome(run: Run, task: Task, folder: Path) -> dict[str, Any]:
    """Return the run with its figures, without bits if the loss was not a number.

    Seconds are CPU time of one core, on which other processes have little effect.
    """
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    method = METHODS[run.method]
    model = adapted(method, task, run.r, run.seed, folder)
    ends = [time.process_time()]
    batches = reading(data.source().train, task.base, task.steps, task.batch, run.seed)
    finite = train(model, rated(method, model, run.rate), batches, lambda: ends.append(time.process_time()))
    steps = [end - start for start, end in itertools.pairwise(ends)]
    return {
        **asdict(run),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": median(steps) if steps else None,
        **(bits(model, task) if finite else {"source": None, "english": None}),
    }


def untouched(task: Task, folder: Path) -> dict[str, float]:
    """Return the bits of the pretrained model, which is trained if the folder has none."""
    torch.set_num_threads(1)
    return bits(pretrained(task.base, folder), task)


def adapted(method: Method, task: Task, r: int, seed: int, folder: Path) -> nn.Module:
    """Return the pretrained model, ready to be trained by the method."""
    base = pretrained(task.base, folder)
    torch.manual_seed(seed)
    model = method.adapt(base, r, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_gamma(name):
                parameter.mul_(method.gamma_start)
    return model


def rated(method: Method, model: nn.Module, rate: float) -> Groups:
    """Return the trained parameters as groups with their learning rates."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(rate * (method.gamma_rate if is_gamma(name) else 1), []).append(parameter)
    return [{"params": parameters, "lr": own} for own, parameters in groups.items()]


def is_gamma(name: str) -> bool:
    return "randlora_gamma" in name


def bits(model: nn.Module, task: Task) -> dict[str, float]:
    """Return bits per byte on held-out source and on held-out English."""
    return {name: bits_per_byte(model, windows) for name, windows in held_out(task).items()}


@cache
def held_out(task: Task) -> dict[str, Tensor]:
    texts = {"source": data.source(), "english": data.english()}
    return {name: data.spread(text.held_out, task.windows, task.base.context) for name, text in texts.items()}
