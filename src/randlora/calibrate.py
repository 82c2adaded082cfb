"""Measurement of the planner's rates on this machine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch.nn import functional as F

from randlora.ops import plan as planner
from randlora.ops.bases import BasisKind, BasisSpec, Dense, Structured, Ternary, get_basis
from randlora.ops.linear import adapted_linear, can_fuse, problem_of
from randlora.ops.operands import Sizes
from randlora.ops.plan import BasisWay, Problem, Rates, Way, backward_cost, forward_cost

_RANK = 32
_SHAPES = ((1024, 1024), (2048, 1024), (1024, 2048))  # (out, in)
_TOKENS = (128, 256, 512, 1024, 2048)
_WAYS: tuple[tuple[Way, BasisWay], ...] = (("token", "token"), ("fused", "token"), ("fused", "weight"))
_HALF_WAYS: tuple[tuple[Way, BasisWay], ...] = (("token", "token"), ("weight", "token"), ("weight", "weight"))
_ROUNDS = 5
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """The seconds of one layer's call beyond those of the base layer, for each way of computing the call.

    Attributes:
        problem: function that returns the planner's problem, with costs by the rates in force.
        forward: seconds of the output, by way.
        backward: seconds of the gradients, by the ways of dx and dÃ.
    """

    problem: Callable[[], Problem]
    forward: dict[Way, float]
    backward: dict[tuple[Way, BasisWay], float]


def calibrate(
    device: str | torch.device = "cpu",
    shapes: Iterable[tuple[int, int]] = _SHAPES,
    tokens: Iterable[int] = _TOKENS,
) -> Rates:
    """Measure layers of the given shapes and set the planner's rates to those that fit best.

    Layers are in float32 on a CPU and in bfloat16 on a GPU. On a GPU only the costs of an element are fitted; give
    shapes and tokens of a real model there. The default shapes take about a minute. The rates are in force for this
    process only; another program can pass them to ``randlora.ops.plan.set_rates`` instead of measuring.

    Args:
        device: device to measure on.
        shapes: shapes (out, in) of the layers.
        tokens: numbers of tokens in the calls.

    Returns:
        The rates now in force.
    """
    device, calls = torch.device(device), [(shape, count) for shape in shapes for count in tokens]
    rates = planner.rates_on(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def measured(kind: BasisKind) -> list[Timing]:
        return [measure(*call, kind, device, dtype) for call in calls]

    if device.type == "cuda":
        rates = fitted(measured(Dense()), rates, {"element": _around(rates.element)}, device)
    else:
        rates = fitted(measured(Dense()), rates, {"split": _around(0.85), "element": _around(40.0)}, device)
        sparse = measured(Ternary(2.0 * _RANK))
        rates = fitted(sparse, rates, {"sparse": _around(9.0), "element_sparse": _around(40.0)}, device)
    start = {"element_structured": _around(rates.element_structured)}
    rates = fitted(measured(Structured()), rates, start, device)
    planner.set_rates(rates, device)
    return rates


def measure(
    shape: tuple[int, int],
    tokens: int,
    kind: BasisKind,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Timing:
    """Return the timing of one layer's call in every way of computing it."""
    out, in_ = shape
    m, M = min(shape), max(shape)
    basis = get_basis(BasisSpec(_RANK, m, M, 0, kind, m, M))
    operands = basis.operands(device, dtype, Sizes(M, m, basis.num_bases), tokens)
    lam = torch.full((_RANK, basis.num_bases), 0.01, device=device, requires_grad=True)
    gamma = torch.full((basis.num_bases, m), 1 / M, device=device, requires_grad=True)
    weight = torch.randn(out, in_, device=device, dtype=dtype)
    x = torch.randn(tokens, in_, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, out, device=device, dtype=dtype)
    fusible = can_fuse(dtype, dtype)
    base = _seconds(lambda: F.linear(x, weight), dy)
    timing = Timing(partial(problem_of, operands, tokens, out, in_, fusible), {}, {})
    for way, basis_way in _WAYS if fusible else _HALF_WAYS:
        with planner.force(planner.Plan(way, way, basis_way)):
            found = _seconds(lambda: adapted_linear(x, operands, lam, gamma, 1.0, out, weight), dy)
        timing.forward[way] = found[0] - base[0]
        timing.backward[way, basis_way] = found[1] - base[1]
    return timing


def fitted(
    timings: list[Timing], start: Rates, candidates: dict[str, list[float]], device: torch.device = _CPU
) -> Rates:
    """Return the rates among ``candidates`` with which the planner's choices take the least time in total."""

    def total(rates: Rates) -> float:
        before = planner.rates_on(device)
        planner.set_rates(rates, device)
        try:
            return sum(chosen_seconds(timing) for timing in timings)
        finally:
            planner.set_rates(before, device)

    options = (
        replace(start, **dict(zip(candidates, values, strict=True)))
        for values in itertools.product(*candidates.values())
    )
    return min(options, key=total)


def chosen_seconds(timing: Timing) -> float:
    """Return the measured seconds, forward and backward, of the ways that the planner chooses."""
    problem = timing.problem()
    forward = min(timing.forward, key=lambda way: forward_cost(problem, way))
    backward = min(timing.backward, key=lambda ways: backward_cost(problem, *ways))
    return timing.forward[forward] + timing.backward[backward]


def _around(value: float) -> list[float]:
    """Return candidates from a quarter of the value to four times the value, nearest first."""
    return sorted((value * 2 ** (step / 4) for step in range(-8, 9)), key=lambda found: abs(found / value - 1))


def _seconds(call: Callable[[], torch.Tensor], dy: torch.Tensor) -> tuple[float, float]:
    """Return the median seconds of forward and of backward."""
    found = []
    for _ in range(_ROUNDS + 1):
        start = _now(dy.device)
        y = call()
        middle = _now(dy.device)
        y.backward(dy)
        found.append((middle - start, _now(dy.device) - middle))
    return median(f for f, _ in found[1:]), median(b for _, b in found[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
