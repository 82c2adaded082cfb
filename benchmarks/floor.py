"""The least cost of RandLoRA: multiply-adds counted from the table of docs/design.md, section 2.1.

The code is independent of the library's own planner, as a check of the planner. T is the number of tokens, m and M are
the smaller and the larger dimension of a layer, and q = n·r ≥ m. A frozen layer takes T·m·M forward and T·m·M backward.
Elementwise work, attention and the optimiser are left out. A method's own part of these puts a measured step above the
floor; the part that the frozen step has too brings all methods' multiples of the frozen step closer to 1.
"""

import math

from .methods import DENSE, PEFT_DENSE, PEFT_VERY_SPARSE, SPARSE, STRUCTURED, STRUCTURED_16, VERY_SPARSE

Shapes = list[tuple[int, int]]
"""(out, in) of each layer."""


def step_floor(method: str, adapted: Shapes, layers: Shapes, tokens: int, rank: int, fusible: bool) -> float | None:
    """Return a method's step as a multiple of the frozen one, over ``layers``, among them the ``adapted`` ones.

    ``fusible`` says that W + ΔW may be formed, which half precision forbids. The floor is ``None`` for other methods
    than RandLoRA.
    """
    base = sum(2 * tokens * out * into for out, into in layers)
    if method in (PEFT_DENSE, PEFT_VERY_SPARSE):
        extra = sum(token_space(tokens, out, into, rank) for out, into in adapted)
    elif method in (DENSE, SPARSE):
        extra = sum(cheapest(tokens, out, into, rank, fusible) for out, into in adapted)
    elif method == VERY_SPARSE:
        density = 1 / math.sqrt(max(min(shape) for shape in adapted))
        extra = sum(cheapest(tokens, out, into, rank, fusible, density) for out, into in adapted)
    elif method in (STRUCTURED, STRUCTURED_16):
        groups = 8 if method == STRUCTURED else 16
        extra = sum(by_groups(tokens, out, into, rank, fusible, groups) for out, into in adapted)
    else:
        return None
    return (base + extra) / base


def token_space(T: int, out: int, into: int, rank: int) -> float:
    """Return the cost of PEFT's only way: both factors forward, both again backward for dx, one product for dÃ."""
    m, M, q = _sizes(out, into, rank)
    return T * q * (m + M) + T * q * (m + M) + T * q * m


def cheapest(T: int, out: int, into: int, rank: int, fusible: bool, density: float = 1.0) -> float:
    """Return the cost of output, dÃ and dx each in its cheapest way, with only x kept between forward and backward.

    Bases of a ``density`` below 1 cost only their non-zeros. A and Ã have theirs in the same places.
    """
    m, M, q = _sizes(out, into, rank)
    through_A, through_B = T * q * m * density, T * q * M * density
    weight = q * m * M * density**2  # ΔW = B Ã, or Bᵀ dW where A is not zero
    by_weight = weight + (0 if fusible else T * m * M)
    forward = min(through_A + through_B, by_weight)
    shared = out >= into  # dÃ and dx both need dy B
    backward = min(
        through_B + through_A + min(by_weight, through_A + (0 if shared else through_B)),
        T * m * M + weight + min(by_weight, through_A + through_B),
    )
    return forward + backward


def by_groups(T: int, out: int, into: int, rank: int, fusible: bool, groups: int) -> float:
    """Return the cost as in `cheapest` for structured bases, whose ΔW follows from P = Q_b Ã without a product."""
    m, M, q = _sizes(out, into, rank)
    form = q * m * M / groups**2
    by_token, by_block = T * q * (m + M) / groups, T * m * M / groups + form
    update = min(by_token, by_block, form if fusible else T * m * M + form)
    return 2 * update + min(by_token, by_block)


def _sizes(out: int, into: int, rank: int) -> tuple[int, int, int]:
    m, M = sorted((out, into))
    return m, M, -(-m // rank) * rank
