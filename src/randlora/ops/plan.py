"""Which way to compute the update is cheapest: arithmetic on shapes, no timing.

Counted are multiply-adds per layer, with T tokens, m = min(out, in), M = max(out, in) and q = n·r ≥ m, each weighted
with what one of its kind costs beside one of a plain matrix product (``Rates``). The base layer's own T·M·m forward,
and T·M·m backward where the input needs a gradient, are common to all plans and left out, except that "fused" spares
the second product (``docs/design.md``, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal

import torch

Way = Literal["token", "weight", "fused"]
"""token: (x Ãᵀ) Bᵀ. weight: x ΔWᵀ beside x Wᵀ. fused: x (W + ΔW)ᵀ, for base weights of float32 or wider."""

BasisWay = Literal["token", "weight"]
"""How dÃ is computed: from dy B, or from dW."""

Kind = Literal["dense", "split", "sparse"]
"""dense: plain products with B. split: exact products with a bfloat16 B (``bf16.py``). sparse: ``sparse.py``."""


@dataclass(frozen=True)
class Plan:
    """How one call computes its output and its gradients; any combination is exact.

    Attributes:
        output: y.
        grad_input: dx.
        grad_basis: dÃ, from which dλ and dγ follow; "weight" takes it from dW.
    """

    output: Way
    grad_input: Way
    grad_basis: BasisWay


@dataclass(frozen=True)
class Rates:
    """What one step of each kind costs, in multiply-adds of a plain matrix product.

    The defaults were measured on a server CPU; ``randlora.calibrate`` measures them for the machine at hand.

    Attributes:
        split: a multiply-add of an exact product with a bfloat16 basis.
        sparse: a multiply-add of a product that skips zeros, for each one that it does.
        element: what an element of the weight costs apart from the products (copying W, splitting, adding).
        element_sparse: the same where the products skip zeros.
        sparse_tokens: up to how many tokens products that skip zeros, which run in float32, cost less than plain ones
            in half precision.
    """

    split: float = 0.85
    sparse: float = 9.0
    element: float = 40.0
    element_sparse: float = 40.0
    sparse_tokens: float = 400.0


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
        kind: how products with B are computed.
        density: share of the entries of A and of B that a "sparse" product visits.
    """

    tokens: int
    out_features: int
    in_features: int
    rank: int
    num_bases: int
    can_fuse: bool
    input_needs_grad: bool = True
    kind: Kind = "dense"
    density: tuple[float, float] = (1.0, 1.0)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(T, q, m, M)."""
        m, M = min(self.out_features, self.in_features), max(self.out_features, self.in_features)
        return self.tokens, self.rank * self.num_bases, m, M

    def with_kind(self, kind: Kind, density: tuple[float, float] = (1.0, 1.0)) -> Problem:
        """The same problem for bases of another kind."""
        return replace(self, kind=kind, density=density)

    @property
    def wide(self) -> bool:
        """Whether out < in, so that the update is transposed."""
        return self.out_features < self.in_features


def forward_cost(problem: Problem, way: Way) -> float:
    """Cost of the output beyond the base layer's own."""
    if way == "token":
        return _through_A(problem) + _through_B(problem)
    return _update_cost(problem, fused=way == "fused")


def backward_cost(problem: Problem, grad_input: Way, grad_basis: BasisWay) -> float:
    """Cost of all gradients beyond the base layer's own."""
    T, _, m, M = problem.sizes
    if grad_basis == "token":  # u B, from the M-wide side, and its product with the other side
        cost = _through_B(problem) + _through_A(problem)
    else:
        cost = T * M * m + _weight_product(problem) + _element(problem) * M * m
    if not problem.input_needs_grad:
        return cost
    if grad_input != "token":
        return cost + _update_cost(problem, fused=grad_input == "fused")
    shared = grad_basis == "token" and not problem.wide  # dy B serves dÃ and dx
    return cost + _through_A(problem) + (0 if shared else _through_B(problem))


def choose(problem: Problem) -> Plan:
    """The cheapest plan for ``problem``, or the forced one."""
    if _forced is not None:
        return _allowed(_forced, problem)
    # a compiler traces the arithmetic; else it is done once for each shape
    return _cheapest(problem) if torch.compiler.is_compiling() else _remembered(problem, rates)


@lru_cache(maxsize=4096)
def _remembered(problem: Problem, _rates: Rates) -> Plan:
    return _cheapest(problem)


def _cheapest(problem: Problem) -> Plan:
    ways: tuple[Way, ...] = ("token", "fused" if problem.can_fuse else "weight")
    output, lowest = ways[0], forward_cost(problem, ways[0])  # comparisons: torch.compile traces them
    if forward_cost(problem, ways[1]) < lowest:
        output = ways[1]
    best, lowest = (ways[0], _BASIS_WAYS[0]), backward_cost(problem, ways[0], _BASIS_WAYS[0])
    for pair in product(ways, _BASIS_WAYS):
        cost = backward_cost(problem, *pair)
        if cost < lowest:
            best, lowest = pair, cost
    return Plan(output, *best)


def call_cost(problem: Problem) -> float:
    """Cost of an output beyond the base layer's own, with one pass over Ã and B, which few tokens do not hide."""
    _, q, m, M = problem.sizes
    return forward_cost(problem, choose(problem).output) + rates.element * q * (m + M)


def sum_cost(problem: Problem) -> float:
    """Cost of forming W + ΔW."""
    return _update_cost(problem, fused=True)


@contextmanager
def force(plan: Plan) -> Iterator[None]:
    """Within this context every call takes ``plan`` ("weight" where "fused" would be wrong).

    The gradients' ways are fixed when the forward runs.
    """
    global _forced  # noqa: PLW0603 - a plain global is what torch.compile can guard on
    previous, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = previous


def set_rates(new: Rates) -> None:
    """Makes ``choose`` count with the rates of another machine."""
    global rates  # noqa: PLW0603 - as above
    rates = new


rates = Rates()
_BASIS_WAYS: tuple[BasisWay, ...] = ("token", "weight")
_forced: Plan | None = None


def _through_A(problem: Problem) -> float:
    """T rows between m and q features."""
    T, q, m, _ = problem.sizes
    return T * q * m * (rates.sparse * problem.density[0] if problem.kind == "sparse" else 1.0)


def _through_B(problem: Problem) -> float:
    """T rows between q and M features."""
    T, q, _, M = problem.sizes
    if problem.kind == "sparse":
        return T * M * (q * rates.sparse * problem.density[1] + _element(problem))
    return T * q * M * _rate(problem)


def _weight_product(problem: Problem) -> float:
    """B Ã, or Bᵀ dW."""
    _, q, m, M = problem.sizes
    return q * m * M * (rates.sparse * problem.density[1] if problem.kind == "sparse" else _rate(problem))


def _update_cost(problem: Problem, fused: bool) -> float:
    """x ΔWᵀ, by way of ΔW."""
    T, _, m, M = problem.sizes
    return _weight_product(problem) + _element(problem) * M * m + (0 if fused else T * M * m)


def _rate(problem: Problem) -> float:
    return rates.split if problem.kind == "split" else 1.0


def _element(problem: Problem) -> float:
    return rates.element_sparse if problem.kind == "sparse" else rates.element


def _allowed(plan: Plan, problem: Problem) -> Plan:
    if problem.can_fuse:
        return plan
    return Plan(
        "weight" if plan.output == "fused" else plan.output,
        "weight" if plan.grad_input == "fused" else plan.grad_input,
        plan.grad_basis,
    )
