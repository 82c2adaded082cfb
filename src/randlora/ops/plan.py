"""The choice of the cheapest way to compute the update, by arithmetic on shapes, without timing.

Costs are multiply-adds per layer, for T tokens, m = min(out, in), M = max(out, in) and q = n·r ≥ m. Each is weighted
with its cost relative to a multiply-add of a plain matrix product (``Rates``). Costs of the products with the bases
come from the operands (``Costs``), since each kind of basis has its own. The base layer's own T·M·m forward, and
T·M·m backward if the input needs a gradient, are common to all plans and left out; but "fused" saves the second product
(``docs/design.md``, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple

import torch

Way = Literal["token", "weight", "fused"]
"""token: (x Ãᵀ) Bᵀ. weight: x ΔWᵀ beside x Wᵀ. fused: x (W + ΔW)ᵀ, for base weights of float32 or wider."""

BasisWay = Literal["token", "weight"]
"""Ways to compute dÃ. token: from dy B. weight: from dW."""


@dataclass(frozen=True)
class Plan:
    """The ways in which one call computes its output and its gradients; any combination is exact.

    Attributes:
        output: way to compute y.
        grad_input: way to compute dx.
        grad_basis: way to compute dÃ, from which dλ and dγ follow.
    """

    output: Way
    grad_input: Way
    grad_basis: BasisWay


@dataclass(frozen=True)
class Rates:
    """The cost of one step of each kind, in multiply-adds of a plain matrix product.

    The defaults were measured on a server CPU (``gpu_rates`` on a GPU); ``randlora.calibrate`` measures them for the
    machine at hand.

    Attributes:
        split: a multiply-add of an exact product with a bfloat16 basis.
        sparse: a multiply-add with a non-zero, in a product that skips zeros.
        element: an element of the weight, apart from the products (copying W, splitting, adding).
        element_sparse: an element of the weight, with products that skip zeros.
        element_structured: an element of the weight, with structured bases, which form ΔW without a product.
        sparse_tokens: the number of tokens up to which products that skip zeros, in float32, cost less than plain
            products in half precision.
    """

    split: float = 0.85
    sparse: float = 9.0
    element: float = 40.0
    element_sparse: float = 40.0
    element_structured: float = 8.0
    sparse_tokens: float = 400.0


Products = Literal["plain", "split", "sparse", "structured"]


class Costs(NamedTuple):
    """The costs of one call's products, in multiply-adds of a plain matrix product, as the operands give them.

    Attributes:
        products: the way of products with B: "plain", "split" (exact, of a bfloat16 B), "sparse" or "structured" (by
            groups).
        through_A: the product of T rows between m and q features.
        through_B: the product of T rows between q and M features.
        weight: the product B Ã, or Bᵀ dW.
        element: an element of the weight, apart from the products.
        factors: one pass over Ã and B, which matters with few tokens.
    """

    products: Products
    through_A: float
    through_B: float
    weight: float
    element: float
    factors: float


@dataclass(frozen=True)
class Problem:
    """A call, as far as its cost depends on it.

    Attributes:
        tokens: T, rows of the flattened input.
        out_features: rows of the weight.
        in_features: columns of the weight.
        costs: costs of the products with the bases.
        can_fuse: whether the call may form W + ΔW.
        input_needs_grad: whether the backward has to produce dx.
    """

    tokens: int
    out_features: int
    in_features: int
    costs: Costs
    can_fuse: bool
    input_needs_grad: bool = True

    @property
    def wide(self) -> bool:
        """Whether out < in, so that the update is transposed."""
        return self.out_features < self.in_features

    @property
    def elements(self) -> int:
        """M·m, the number of elements of the weight."""
        return self.out_features * self.in_features


def forward_cost(problem: Problem, way: Way) -> float:
    """Return the cost of the output beyond the base layer's own."""
    if way == "token":
        return problem.costs.through_A + problem.costs.through_B
    return _update_cost(problem, fused=way == "fused")


def backward_cost(problem: Problem, grad_input: Way, grad_basis: BasisWay) -> float:
    """Return the cost of all gradients beyond the base layer's own."""
    costs = problem.costs
    if grad_basis == "token":  # u B, from the M-wide side, and its product with the other side
        cost = costs.through_B + costs.through_A
    else:
        cost = problem.tokens * problem.elements + costs.weight + costs.element * problem.elements
    if not problem.input_needs_grad:
        return cost
    if grad_input != "token":
        return cost + _update_cost(problem, fused=grad_input == "fused")
    shared = grad_basis == "token" and not problem.wide  # dy B serves dÃ and dx
    return cost + costs.through_A + (0 if shared else costs.through_B)


def step_cost(problem: Problem) -> float:
    """Return the cost of a training step, forward and backward, by the plan that is chosen."""
    plan = choose(problem)
    return forward_cost(problem, plan.output) + backward_cost(problem, plan.grad_input, plan.grad_basis)


def choose(problem: Problem) -> Plan:
    """Return the cheapest plan for ``problem``, or the forced one."""
    if _forced is not None:
        return _allowed(_forced, problem)
    # a compiler traces the arithmetic and cannot cache
    return _cheapest(problem) if torch.compiler.is_compiling() else _remembered(problem)


@lru_cache(maxsize=4096)
def _remembered(problem: Problem) -> Plan:
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
    """Return the cost of an output beyond the base layer's own, with one pass over Ã and B."""
    return forward_cost(problem, choose(problem).output) + problem.costs.factors


def sum_cost(problem: Problem) -> float:
    """Return the cost of forming W + ΔW."""
    return _update_cost(problem, fused=True)


@contextmanager
def force(plan: Plan) -> Iterator[None]:
    """Make every call within this context take ``plan``, but "weight" for "fused" where W + ΔW may not be formed.

    The gradients' ways are fixed when the forward runs.
    """
    global _forced  # noqa: PLW0603 - a plain global is what torch.compile can guard on
    previous, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = previous


def forced() -> Plan | None:
    """Return the plan that every call takes now, if one is forced."""
    return _forced


def set_rates(new: Rates, device: str | torch.device = "cpu") -> None:
    """Set the rates with which ``choose`` counts calls on devices of that type."""
    global rates, gpu_rates  # noqa: PLW0603 - as above
    if torch.device(device).type == "cuda":
        gpu_rates = new
    else:
        rates = new


def rates_on(device: torch.device) -> Rates:
    """Return the rates with which calls on ``device`` are counted."""
    return gpu_rates if device.type == "cuda" else rates


rates = Rates()
gpu_rates = Rates(element=270.0, element_structured=270.0)
"""Rates on an NVIDIA GPU: an H100 does 403 T multiply-adds in bf16 while it moves 3.005 TB, 270 for two bytes."""
_BASIS_WAYS: tuple[BasisWay, ...] = ("token", "weight")
_forced: Plan | None = None


def _update_cost(problem: Problem, fused: bool) -> float:
    """Return the cost of x ΔWᵀ with ΔW formed."""
    formed = problem.costs.weight + problem.costs.element * problem.elements
    return formed + (0 if fused else problem.tokens * problem.elements)


def _allowed(plan: Plan, problem: Problem) -> Plan:
    if problem.can_fuse:
        return plan
    return Plan(
        "weight" if plan.output == "fused" else plan.output,
        "weight" if plan.grad_input == "fused" else plan.grad_input,
        plan.grad_basis,
    )
