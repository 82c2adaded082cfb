"""What RandLoRA must cost at least: multiply-adds counted from the table of docs/design.md, section 2.1.

Written apart from the library's own planner, to be a check of it. T tokens, m and M the smaller and the larger
dimension of a layer, q = n·r ≥ m. A frozen layer takes T·m·M forward and T·m·M backward. Elementwise work, attention
and the optimiser are left out: what of it is a method's own puts a measured step above the floor, and what the frozen
step has too brings all methods' multiples of it closer to 1.
"""

import math

from .methods import DENSE, PEFT_DENSE, PEFT_VERY_SPARSE, SPARSE, STRUCTURED, STRUCTURED_16, VERY_SPARSE

Shapes = list[tuple[int, int]]
"""(out, in) of each layer."""


def step_floor(method: str, adapted: Shapes, layers: Shapes, tokens: int, rank: int, fusible: bool) -> float | None:
    """A method's step as a multiple of the frozen one, over ``layers`` of which ``adapted`` are adapted.

    ``fusible`` says that W + ΔW may be formed, which half precision forbids. None for what is not RandLoRA.
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
    """The only way of PEFT's: both factors forward; both again backward for dx, and one product for dÃ."""
    m, M, q = _sizes(out, into, rank)
    return T * q * (m + M) + T * q * (m + M) + T * q * m


def cheapest(T: int, out: int, into: int, rank: int, fusible: bool, density: float = 1.0) -> float:
    """Output, dÃ and dx each in its cheapest way, with nothing but x kept between forward and backward.

    Bases of a ``density`` below 1 make work only where they are not zero: A and Ã in the same places, and B.
    """
    m, M, q = _sizes(out, into, rank)
    through_A, through_B = T * q * m * density, T * q * M * density
    weight = q * m * M * density**2  # ΔW = B Ã, or Bᵀ dW where A is not zero
    by_weight = weight + (0 if fusible else T * m * M)
    forward = min(through_A + through_B, by_weight)
    shared = out >= into  # dy B is a step on the way to dÃ and to dx
    backward = min(
        through_B + through_A + min(by_weight, through_A + (0 if shared else through_B)),
        T * m * M + weight + min(by_weight, through_A + through_B),
    )
    return forward + backward


def by_groups(T: int, out: int, into: int, rank: int, fusible: bool, groups: int) -> float:
    """The same of structured bases, whose ΔW is spread from P = Q_b Ã without a product."""
    m, M, q = _sizes(out, into, rank)
    form = q * m * M / groups**2
    by_token, by_block = T * q * (m + M) / groups, T * m * M / groups + form
    update = min(by_token, by_block, form if fusible else T * m * M + form)
    return 2 * update + min(by_token, by_block)


def _sizes(out: int, into: int, rank: int) -> tuple[int, int, int]:
    m, M = sorted((out, into))
    return m, M, -(-m // rank) * rank
