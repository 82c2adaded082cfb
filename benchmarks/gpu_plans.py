"""The planner's choices on a device: an adapted layer in bf16, forward and backward, by every plan."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from randlora.ops.bases import BasisKind, Dense, Structured
from randlora.ops.plan import BasisWay, Plan, Way, choose

from .crossover import Layer
from .gpu_clock import milliseconds

KINDS: dict[str, BasisKind] = {"dense": Dense(), "structured": Structured()}
OUTPUT: tuple[Way, ...] = ("token", "weight")
GRADIENTS: tuple[tuple[Way, BasisWay], ...] = tuple(product(OUTPUT, ("token", "weight")))


def run(
    device: torch.device, shapes: list[tuple[int, int]], tokens: list[int], rank: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape (out, in), kind, number of tokens and direction."""
    for out, into in shapes:
        for name, kind in KINDS.items():
            layer = Layer(out, into, kind, rank, device, torch.bfloat16)
            for count in tokens:
                for direction, (chosen, times) in measured(layer, count, rounds).items():
                    fastest = min(times, key=times.__getitem__)
                    yield {
                        "layer": f"{out}×{into}",
                        "bases": name,
                        "tokens": count,
                        "direction": direction,
                        "chosen": chosen,
                        "ms": times[chosen],
                        "fastest": fastest,
                        "fastest ms": times[fastest],
                        "chosen / fastest": times[chosen] / times[fastest],
                        "all ms": times,
                    }


def measured(layer: Layer, tokens: int, rounds: int) -> dict[str, tuple[str, dict[str, float]]]:
    """Return for each direction the chosen plan and the milliseconds of every plan."""
    device, x, chosen = layer.weight.device, layer.input(tokens), choose(layer.problem(tokens))
    dy = layer.weight.new_empty(tokens, layer.weight.shape[0]).normal_()

    def backward(plan: Plan) -> float:
        y, inputs = layer.output(x, plan), [x, layer.lam, layer.gamma]
        return milliseconds(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True), device, rounds)

    with torch.no_grad():
        forward: dict[str, float] = {
            way: milliseconds(partial(layer.output, x, Plan(way, "token", "token")), device, rounds) for way in OUTPUT
        }
    gradients = {f"{dx}, {basis}": backward(Plan("token", dx, basis)) for dx, basis in GRADIENTS}
    return {
        "forward": (chosen.output, forward),
        "backward": (f"{chosen.grad_input}, {chosen.grad_basis}", gradients),
    }
