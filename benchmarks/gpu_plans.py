"""The planner's choices on a device: an adapted layer in bf16, forward and backward, by every plan."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from randlora.ops import plan as planner
from randlora.ops.bases import BasisKind, BasisSpec, Dense, Structured, get_basis
from randlora.ops.linear import adapted_linear, problem_of
from randlora.ops.operands import Sizes
from randlora.ops.plan import BasisWay, Plan, Way, choose

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
            layer = Layer(device, out, into, kind, rank)
            for count in tokens:
                for direction, (chosen, times) in layer.times(count, rounds).items():
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


class Layer:
    """One adapted layer, as its operands."""

    def __init__(self, device: torch.device, out: int, into: int, kind: BasisKind, rank: int) -> None:
        m, M = sorted((out, into))
        basis = get_basis(BasisSpec(rank, m, M, 0, kind, m, M))
        self.bases = basis.operands(device, torch.bfloat16, Sizes(M, m, basis.num_bases))
        self.lam = torch.randn(rank, basis.num_bases, device=device, requires_grad=True)
        self.gamma = torch.full((basis.num_bases, m), 1 / M, device=device, requires_grad=True)
        self.weight = torch.randn(out, into, device=device, dtype=torch.bfloat16)

    def times(self, tokens: int, rounds: int) -> dict[str, tuple[str, dict[str, float]]]:
        """Return for each direction the chosen plan and the milliseconds of every plan."""
        out, into = self.weight.shape
        device, dtype = self.weight.device, self.weight.dtype
        x = torch.randn(tokens, into, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(tokens, out, device=device, dtype=dtype)
        operands = self.bases.scaled_by(1.0)
        chosen = choose(problem_of(operands, tokens, out, into, fusible=False))

        def output(plan: Plan) -> torch.Tensor:
            with planner.force(plan):
                return adapted_linear(x, self.bases, self.lam, self.gamma, 1.0, out, self.weight)

        def backward(plan: Plan) -> float:
            y = output(plan)
            inputs = [x, self.lam, self.gamma]
            return milliseconds(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True), device, rounds)

        with torch.no_grad():
            forward: dict[str, float] = {
                way: milliseconds(partial(output, Plan(way, "token", "token")), device, rounds) for way in OUTPUT
            }
        gradients = {f"{dx}, {basis}": backward(Plan("token", dx, basis)) for dx, basis in GRADIENTS}
        return {
            "forward": (chosen.output, forward),
            "backward": (f"{chosen.grad_input}, {chosen.grad_basis}", gradients),
        }
