"""Seconds of one real training step, method beside method, as a multiple of the frozen model's step.

A step is forward, loss, backward, and AdamW on all that trains. In every method the embeddings' output requires a
gradient (as with gradient checkpointing), so that all walk the same path back through the model. The frozen model's
step is that path alone, without gradients of weights and without an optimiser. All methods but full fine-tuning work on
the same frozen weights. A compute dtype other than fp32 is that of the model's weights; adapters stay in fp32, as PEFT
makes them.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .floor import step_floor
from .methods import FROZEN, METHODS, PEERS, TWINS
from .models import Architecture, linear_shapes, twin
from .rounds import Seconds, added_ratio, interleave, ratio, typical

_FLOORS = ("floor", "layers' floor")
COLUMNS = ("tokens", "method", "trainable", "seconds", "× frozen", *_FLOORS, "× PEFT", "added × PEFT", "loss")
"""floor: `× frozen` if only large products took time (see floor.py). layers' floor: the same for the adapted layers
alone. × PEFT: the step as a multiple of that of PEFT's RandLora. added × PEFT: the same for the time beyond the frozen
step, that is, over the adapted layers.
"""
LEARNING_RATE = 1e-4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # of a loss, relative to PEFT's


class Step:
    """One method's model, optimiser and losses so far."""

    def __init__(self, model: Any) -> None:
        self.model = model.train()
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE) if self.trainable else None
        self.losses: list[float] = []

    def __call__(self, batch: dict[str, Tensor]) -> None:
        loss = self.model(**batch).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses.append(loss.item())


@dataclass(frozen=True)
class Comparison:
    """A comparison of ``rounds`` steps of ``tokens`` tokens, after one step that creates the optimiser's state."""

    architecture: Architecture
    tokens: int
    rounds: int
    dtype: torch.dtype = torch.float32
    methods: tuple[str, ...] = tuple(METHODS)
    clock: Callable[[], float] = time.perf_counter

    def run(self) -> list[dict[str, Any]]:
        """Yield one row for each method."""
        base: Any = self.architecture.build()
        base.to(self.dtype).requires_grad_(False)
        steps = {name: Step(METHODS[name](twin(base), self.architecture)) for name in self.methods}
        for step in steps.values():
            step.model.enable_input_require_grads()
        batch = self.architecture.batch(self.tokens)
        _, *history = interleave(
            {name: partial(step, batch) for name, step in steps.items()}, 1 + self.rounds, self.clock
        )
        require_equal_losses({name: step.losses for name, step in steps.items()}, TOLERANCE[self.dtype])
        return [self._row(name, step, history, base) for name, step in steps.items()]

    def _row(self, name: str, step: Step, history: list[Seconds], base: Any) -> dict[str, Any]:
        peer = PEERS.get(name)
        compared = peer in self.methods
        return {
            "tokens": self.tokens,
            "method": name,
            "trainable": sum(p.numel() for p in step.trainable),
            "seconds": typical(history, name),
            "× frozen": ratio(history, name, FROZEN),
            **self._floors(name, base),
            "× PEFT": ratio(history, name, peer) if peer and compared else None,
            "added × PEFT": added_ratio(history, name, peer, FROZEN) if peer and compared else None,
            "loss": step.losses[-1],
            "all seconds": [times[name] for times in history],
        }

    def _floors(self, name: str, base: Any) -> dict[str, float | None]:
        adapted = linear_shapes(base, self.architecture.targets)
        head = base.get_output_embeddings()
        every = adapted if head is None else [*adapted, tuple(head.weight.shape)]
        sizes = (self.tokens, self.architecture.rank, self.dtype == torch.float32)
        return {
            label: step_floor(name, adapted, layers, *sizes)
            for label, layers in zip(_FLOORS, (every, adapted), strict=True)
        }


def require_equal_losses(losses: Mapping[str, list[float]], tolerance: float) -> None:
    """Raise if our losses differ from those of PEFT's RandLora: a speed counts only with the right result."""
    for mine, theirs in TWINS.items():
        for number, (own, peer) in enumerate(zip(losses.get(mine, []), losses.get(theirs, []), strict=False)):
            if not abs(own - peer) <= tolerance * peer:
                raise RuntimeError(f"step {number}: the loss of {mine!r} is {own}, but that of {theirs!r} {peer}")
