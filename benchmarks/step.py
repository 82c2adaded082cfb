"""Seconds of one real training step, method beside method, as a multiple of the frozen model's step.

A step is forward, loss, backward, and AdamW on whatever trains. In every method the embeddings' output requires a
gradient (as with gradient checkpointing), so that all walk the same path back through the model. The frozen model's
step is that path and nothing else: no gradient of any weight, no optimiser.

All methods take one step in each round, in turn, so that a disturbance of the machine falls on all of them alike. A
method's multiple is the median over rounds of its time divided by the frozen model's time in the same round.
"""

import time
from statistics import median
from typing import Any

import torch
from torch import nn

from .methods import METHODS, PEFT_RANDLORA, RANDLORA
from .models import LLAMA, LLAMA_QUICK, Shape

SEQUENCE = 256  # tokens of one sequence; a batch has as many as its tokens need
LEARNING_RATE = 1e-4
COLUMNS = ("tokens", "method", "trainable", "seconds", "× frozen", "loss")


class Step:
    """One method's model, optimiser and batch."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor) -> None:
        self.model = model.train()
        self.tokens = tokens
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE) if self.trainable else None
        embeddings = next(module for module in model.modules() if isinstance(module, nn.Embedding))
        embeddings.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))

    def __call__(self) -> tuple[float, float]:
        """Seconds and loss."""
        start = time.perf_counter()
        loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - start, loss.item()


def run(quick: bool) -> list[dict[str, Any]]:
    shape, batches, rounds = (LLAMA_QUICK, (64, 256), 3) if quick else (LLAMA, (256, 2048), 5)
    return [row for tokens in batches for row in compare(shape, tokens, rounds)]


def compare(shape: Shape, tokens: int, rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    sequence = min(tokens, SEQUENCE)
    batch = torch.randint(shape.vocab, (tokens // sequence, sequence), generator=generator)
    steps = {name: Step(build(shape), batch) for name, build in METHODS.items()}
    history = [{name: step() for name, step in steps.items()} for _ in range(rounds + 1)]
    require_equal_losses(history)
    measured = history[1:]  # the first round warms up
    return [
        {
            "tokens": tokens,
            "method": name,
            "trainable": sum(p.numel() for p in steps[name].trainable),
            "seconds": median(times[name][0] for times in measured),
            "× frozen": median(times[name][0] / times["frozen"][0] for times in measured),
            "loss": measured[-1][name][1],
            "all seconds": [times[name][0] for times in measured],
        }
        for name in steps
    ]


def require_equal_losses(history: list[dict[str, tuple[float, float]]]) -> None:
    """A speed counts only where the result is right: ours must learn exactly as PEFT's RandLora does."""
    for number, losses in enumerate(history):
        theirs, mine = losses[PEFT_RANDLORA][1], losses[RANDLORA][1]
        if not abs(theirs - mine) <= 1e-3 * theirs:
            raise RuntimeError(f"round {number}: the loss is {mine} with randlora but {theirs} with PEFT")
