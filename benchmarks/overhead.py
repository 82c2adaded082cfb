"""Host time: CPU time of one thread, for layers and a model so small that only Python and launches take time.

Host time limits steps with few tokens on any device, and can be measured without the device.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .methods import DENSE, LORA, METHODS, PEFT_DENSE, VERY_SPARSE, fill_scalings
from .models import Llama, Target, twin
from .rounds import interleave, ratio, typical

COLUMNS = ("what", "method", "µs forward", "× LoRA", "µs forward and backward", "× LoRA, both")
CHOSEN = (LORA, PEFT_DENSE, DENSE, VERY_SPARSE)
WIDTH, TOKENS, CALLS = 64, 4, 100
TINY = Llama(hidden=64, intermediate=160, layers=2, heads=4, vocab=128, rank=8)


class OneLayer:
    """A model of a single linear layer, in the form that the methods take."""

    rank, targets = 8, "0"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH))


def run(quick: bool) -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from compare("64×64 layer, 4 tokens", layers(), CALLS, 3 if quick else 25)
        yield from compare("tiny Llama, 4 tokens", llamas(), 1 if quick else 5, 3 if quick else 25)
    finally:
        torch.set_num_threads(threads)


def compare(what: str, calls: dict[str, Callable[[], Tensor]], repeats: int, rounds: int) -> Iterator[dict[str, Any]]:
    named = {
        f"{name} {both}": partial(repeat, call, repeats, both) for name, call in calls.items() for both in (False, True)
    }
    _, *history = interleave(named, 1 + rounds, clock=time.process_time)
    for name in calls:
        forward, both = (f"{name} {flag}" for flag in (False, True))
        yield {
            "what": what,
            "method": name,
            "µs forward": 1e6 * typical(history, forward) / repeats,
            "× LoRA": ratio(history, forward, f"{LORA} False"),
            "µs forward and backward": 1e6 * typical(history, both) / repeats,
            "× LoRA, both": ratio(history, both, f"{LORA} True"),
            "all seconds": [[times[forward], times[both]] for times in history],
        }


def repeat(call: Callable[[], Tensor], times: int, both: bool) -> None:
    for _ in range(times):
        y = call()
        if both:
            y.sum().backward()


def layers() -> dict[str, Callable[[], Tensor]]:
    """Yield rows for calls of the adapted layer alone, without a model around it."""
    base, x = OneLayer().build().requires_grad_(False), torch.randn(TOKENS, WIDTH, requires_grad=True)
    models = {name: filled(name, base, OneLayer()) for name in CHOSEN}
    found = {name: next(m for m in model.modules() if hasattr(m, "base_layer")) for name, model in models.items()}
    return {name: partial(layer, x) for name, layer in found.items()}


def llamas() -> dict[str, Callable[[], Tensor]]:
    base, batch = TINY.build().requires_grad_(False), TINY.batch(TOKENS)
    models = {name: filled(name, base, TINY) for name in CHOSEN}
    return {name: partial(_loss, model, batch) for name, model in models.items()}


def filled(name: str, base: Any, target: Target) -> Any:
    model = METHODS[name](twin(base), target)
    fill_scalings(model)
    return model.train()


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss
