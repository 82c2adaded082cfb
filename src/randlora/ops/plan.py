"""Which way to compute the update is cheapest: arithmetic on shapes, no timing.

Counted are multiply-adds per layer, with T tokens, m = min(out, in), M = max(out, in) and q = n·r ≥ m. The base
layer's own T·M·m forward, and T·M·m backward where the input needs a gradient, are common to all plans and left out,
except that "fused" spares the second product (``docs/design.md``, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Way = Literal["token", "weight", "fused"]
"""token: (x Ãᵀ) Bᵀ. weight: x ΔWᵀ beside x Wᵀ. fused: x (W + ΔW)ᵀ, for base weights of float32 or wider."""


@dataclass(frozen=True)
class Plan:
    """How one call computes its forward and its backward; any pair is exact."""

    forward: Way
    backward: Way


@dataclass(frozen=True)
class Problem:
    """What the cost of one call depends on.

    Attributes:
        tokens: T, rows of the flattened input.
        out_features: rows of the weight.
        in_features: columns of the weight.
        rank: r.
        num_bases: n.
        can_fuse: the base weight is at hand in the dtype of the product, which is float32 or float64.
        input_needs_grad: whether the backward has to produce dx.
    """

    tokens: int
    out_features: int
    in_features: int
    rank: int
    num_bases: int
    can_fuse: bool
    input_needs_grad: bool = True


def forward_cost(problem: Problem, way: Way) -> int:
    """Multiply-adds of the forward beyond the base layer's own."""
    T, q = problem.tokens, problem.rank * problem.num_bases
    m, M = _sizes(problem)
    if way == "token":
        return T * q * (m + M)
    return q * m * M + (0 if way == "fused" else T * m * M)


def backward_cost(problem: Problem, way: Way) -> int:
    """Multiply-adds of the backward beyond the base layer's own."""
    T, q = problem.tokens, problem.rank * problem.num_bases
    m, M = _sizes(problem)
    into_m = m if problem.out_features >= problem.in_features else M  # width of dx
    if way == "token":
        # dH or, for a wide layer, H again, and dÃ; then dx through both factors, of which one may be at hand
        dx = T * q * (into_m if into_m == m else m + M)
        return T * q * M + T * q * m + (dx if problem.input_needs_grad else 0)
    dx = q * m * M + (0 if way == "fused" else T * m * M)
    return T * m * M + q * m * M + (dx if problem.input_needs_grad else 0)


def choose(problem: Problem) -> Plan:
    """The cheapest plan for ``problem``, or the forced one."""
    if _forced is not None:
        return _allowed(_forced, problem)
    other: Way = "fused" if problem.can_fuse else "weight"
    return Plan(
        forward="token" if forward_cost(problem, "token") <= forward_cost(problem, other) else other,
        backward="token" if backward_cost(problem, "token") <= backward_cost(problem, other) else other,
    )


@contextmanager
def force(forward: Way, backward: Way) -> Iterator[None]:
    """Within this context every call takes the given plan ("weight" where "fused" would be wrong).

    The backward's way is fixed when the forward runs.
    """
    global _forced  # noqa: PLW0603 - a plain global is what torch.compile can guard on
    previous, _forced = _forced, Plan(forward, backward)
    try:
        yield
    finally:
        _forced = previous


_forced: Plan | None = None


def _allowed(plan: Plan, problem: Problem) -> Plan:
    if problem.can_fuse:
        return plan
    return Plan(
        "weight" if plan.forward == "fused" else plan.forward,
        "weight" if plan.backward == "fused" else plan.backward,
    )


def _sizes(problem: Problem) -> tuple[int, int]:
    return (
        min(problem.out_features, problem.in_features),
        max(problem.out_features, problem.in_features),
    )
