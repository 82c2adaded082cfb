"""The sizes of the hard task: one set for the study, and small ones for a trial run."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Pretraining:
    """A GPT-2 on bytes and its training on English; any change makes another base model."""

    layers: int = 2
    hidden: int = 256
    inner: int = 512
    heads: int = 4
    context: int = 128
    steps: int = 1500
    batch: int = 16
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Task:
    """The adaptation of that model to source code.

    ``ranks`` are r of RandLoRA, one for each budget of trainable values; ``windows`` of each text are held out.
    """

    base: Pretraining = Pretraining()
    steps: int = 200
    batch: int = 8
    windows: int = 256
    ranks: tuple[int, ...] = (32, 8)
    seeds: int = 3


STUDY = Task()
QUICK = Task(Pretraining(1, 32, 64, 2, 32, steps=20, batch=8), steps=4, windows=8, ranks=(8, 4), seeds=2)


def name_of(settings: Pretraining | Task) -> str:
    """Return the name under which results of these settings are kept, equal for equal settings."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
