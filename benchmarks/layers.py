"""Forward and backward of one layer over a grid of shapes and tokens, in fp32, as multiples of the frozen layer's.

The input requires a gradient, as inside a model. Outputs and gradients of ours are compared with those of PEFT's before
any time is reported.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .floor import step_floor
from .methods import DENSE, FROZEN, METHODS, PEFT_DENSE, SPARSE, TWINS, VERY_SPARSE, fill_scalings
from .models import twin
from .rounds import interleave, ratio, typical

COLUMNS = ("out", "in", "tokens", "method", "seconds", "× frozen", "floor", "× PEFT")
SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (768, 3072), (3072, 768), (1024, 2816), (2816, 1024))  # (out, in)
TOKENS = (128, 512, 1024, 2048, 4096)
OURS = (DENSE, SPARSE, VERY_SPARSE)
TOLERANCE = 1e-3  # of the largest value


@dataclass(frozen=True)
class OneLayer:
    """A model of a single linear layer, in the form that the methods take."""

    out: int
    into: int
    rank: int = 32
    targets: str = "0"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(self.into, self.out, bias=False)).requires_grad_(False)


def run(quick: bool) -> Iterator[dict[str, Any]]:
    for out, into in ((192, 256),) if quick else SHAPES:
        for tokens in (128,) if quick else TOKENS:
            yield from compare(OneLayer(out, into), tokens, rounds=3 if quick else 9)


def compare(layer: OneLayer, tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    base = layer.build()
    models = {name: METHODS[name](twin(base), layer) for name in (FROZEN, PEFT_DENSE, *OURS)}
    for model in models.values():
        fill_scalings(model)
    x, dy = torch.randn(tokens, layer.into, requires_grad=True), torch.randn(tokens, layer.out)
    require_equal_gradients(models, x, dy)
    passes = {name: partial(gradients, model, x, dy) for name, model in models.items()}
    history = interleave(passes, rounds)
    shape = [(layer.out, layer.into)]
    for name in models:
        yield {
            "out": layer.out,
            "in": layer.into,
            "tokens": tokens,
            "method": name,
            "seconds": typical(history, name),
            "× frozen": ratio(history, name, FROZEN),
            "floor": step_floor(name, shape, shape, tokens, layer.rank, fusible=True),
            "× PEFT": ratio(history, name, PEFT_DENSE) if name in OURS else None,
            "all seconds": [times[name] for times in history],
        }


def gradients(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Return the output, dx, and the gradients of the trained parameters, in their order."""
    y = model(x)
    return [y, *torch.autograd.grad(y, [x, *(p for p in model.parameters() if p.requires_grad)], dy)]


def require_equal_gradients(models: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    mine, theirs = gradients(models[DENSE], x, dy), gradients(models[TWINS[DENSE]], x, dy)
    for number, (own, peer) in enumerate(zip(mine, theirs, strict=True)):
        if not (own - peer).abs().max() <= TOLERANCE * peer.abs().max():
            raise RuntimeError(f"result {number} of a layer of {dy.shape[1]}×{x.shape[1]} differs from PEFT's")
