"""The crossover from token space to weight space, as counted by the planner and as measured.

Forward and backward of one layer in fp32 run with either plan forced, at numbers of tokens around the one at which the
planner changes from one to the other. The measured crossover is the zero of a line through the logarithms of the ratios
of their times. At the planned crossover both should take equally long; "off by" is the cost of a wrong choice there.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from randlora.ops import plan as planner
from randlora.ops.bases import BasisKind, BasisSpec, Dense, Ternary, get_basis
from randlora.ops.linear import adapted_linear, fuses, problem_of
from randlora.ops.operands import Sizes
from randlora.ops.plan import Plan, Problem, backward_cost, forward_cost

from .rounds import interleave, ratio, seconds

COLUMNS = ("out", "in", "bases", "direction", "planned tokens", "measured tokens", "planned / measured", "off by")
SHAPES = ((1024, 1024), (2048, 2048), (2816, 1024), (1024, 2816))  # (out, in)
RANK = 32
PLANS = {"token": Plan("token", "token", "token"), "weight": Plan("fused", "fused", "weight")}
MOST_TOKENS = 1 << 14
SPAN = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)  # times the planned crossover

Costs = dict[str, tuple[Callable[[Problem], float], Callable[[Problem], float]]]
COSTS: Costs = {
    "forward": (lambda p: forward_cost(p, "token"), lambda p: forward_cost(p, "fused")),
    "backward": (lambda p: backward_cost(p, "token", "token"), lambda p: backward_cost(p, "fused", "weight")),
}


def run(quick: bool) -> Iterator[dict[str, Any]]:
    for out, into in ((192, 256),) if quick else SHAPES:
        for name, kind in (("dense", Dense()), ("very sparse", Ternary(2 * math.sqrt(max(out, into))))):
            layer = Layer(out, into, kind)
            for direction in COSTS:
                planned = planned_crossover(layer.problem, direction)
                if planned is not None:
                    row = compare(layer, direction, planned, rounds=3 if quick else 9)
                    yield {"out": out, "in": into, "bases": name, **row}


class Layer:
    """One adapted layer, as its operands."""

    def __init__(
        self,
        out: int,
        into: int,
        kind: BasisKind,
        rank: int = RANK,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        m, M = sorted((out, into))
        basis = get_basis(BasisSpec(rank, m, M, 0, kind, m, M))
        self.bases = basis.operands(device, dtype, Sizes(M, m, basis.num_bases))
        self.lam = torch.full((rank, basis.num_bases), 0.01, device=device, requires_grad=True)
        self.gamma = torch.full((basis.num_bases, m), 1 / M, device=device, requires_grad=True)
        self.weight = torch.randn(out, into, device=device, dtype=dtype)

    def problem(self, tokens: int) -> Problem:
        out, into = self.weight.shape
        return problem_of(self.bases, tokens, out, into, fuses(self.weight.dtype, self.weight.dtype))

    def input(self, tokens: int) -> Tensor:
        return self.weight.new_empty(tokens, self.weight.shape[1]).normal_().requires_grad_()

    def output(self, x: Tensor, plan: Plan) -> Tensor:
        """Return the output by ``plan``, which also fixes the ways of the gradients."""
        with planner.force(plan):
            return adapted_linear(x, self.bases, self.lam, self.gamma, 1.0, self.weight.shape[0], self.weight)


def compare(layer: Layer, direction: str, planned: int, rounds: int) -> dict[str, Any]:
    tokens = [max(1, round(planned * factor)) for factor in SPAN]
    ratios = [measured_ratio(layer, direction, count, rounds) for count in tokens]
    slope, intercept = np.polyfit(np.log(tokens), np.log(ratios), 1)
    measured = math.exp(-intercept / slope)
    return {
        "direction": direction,
        "planned tokens": planned,
        "measured tokens": round(measured),
        "planned / measured": planned / measured,
        "off by": math.exp(abs(slope * math.log(planned) + intercept)) - 1,
        "ratios": dict(zip(map(str, tokens), ratios, strict=True)),
    }


def planned_crossover(problem: Callable[[int], Problem], direction: str) -> int | None:
    """Return the least number of tokens with a cheaper weight space; mostly ``None`` for very sparse bases."""
    token, weight = COSTS[direction]
    low, high = 0, MOST_TOKENS
    if token(problem(high)) <= weight(problem(high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        at = problem(middle)
        low, high = (middle, high) if token(at) <= weight(at) else (low, middle)
    return high


def measured_ratio(layer: Layer, direction: str, tokens: int, rounds: int) -> float:
    """Return the time in token space divided by the time in weight space."""
    x, dy = layer.input(tokens), torch.randn(tokens, layer.weight.shape[0])
    forward = {name: partial(layer.output, x, plan) for name, plan in PLANS.items()}
    if direction == "forward":
        _, *history = interleave(forward, 1 + rounds)
    else:
        history = [
            {name: seconds(partial(call().backward, dy)) for name, call in forward.items()} for _ in range(rounds)
        ]
    return ratio(history, "token", "weight")
