"""The kernel of dλ and dγ: dÃ exists as one tile at a time, which is summed up where it was computed.

No float is added atomically: each program writes sums of its own, which are then added in a fixed order, so that the
same inputs give the same bits. ``reference.py`` has the twin.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from randlora.ops.gpu.tiles import (
    add_dot,
    basis,
    basis_and_row,
    blocks,
    bucket,
    interpreting,
    matrix,
    place,
    strides,
    tuned,
)


def scaling_gradients(
    left: Tensor,  # (t, q), the dtype of right, or int8 codes
    right: Tensor,  # (t, m)
    A: Tensor,  # (r, ≥ m), the dtype of right, or int8 codes
    lam: Tensor,  # (r, n) float32
    gamma: Tensor,  # (n, m) float32
) -> tuple[Tensor, Tensor]:
    """dλ (r, n) and dγ (n, m) from dÃ = leftᵀ right, float32."""
    (t, m), (r, n) = right.shape, lam.shape
    rows, columns = tile(r * n, m)
    part = min(triton.next_power_of_2(r), rows)  # rows of A in a tile
    parts, tiles = triton.cdiv(r, part), triton.cdiv(m, columns)
    d_lam, d_gamma = lam.new_empty(tiles, r, n), gamma.new_empty(parts, n, m)
    _scaling_gradients[(parts * triton.cdiv(n, rows // part) * tiles,)](
        *(d_lam, d_gamma, left, right, A, lam, gamma, t, m, n, bucket(t)),
        *strides(left, right),
        A.stride(0),
        RANK=r,
        PART=part,
        ROWS=rows,
        COLUMNS=columns,
        **{name: size for name, size in blocks().items() if name == "DEPTH"},
    )
    return d_lam.sum(0), d_gamma.sum(0)


def tile(q: int, m: int) -> tuple[int, int]:
    """Rows and columns of dÃ that a program sums: fewer where there would be too few programs for a large GPU.

    Not tuned, since the shares of the sums have its shape.
    """
    if interpreting:
        return 32, 32
    return (128, 128) if q * m >= 256 * 128 * 128 else (64, 64)


@tuned("reduction", ["bucket", "width", "n", "RANK"])
@triton.jit(do_not_specialize=["depth", "bucket"])
def _scaling_gradients(
    d_lam, d_gamma, left, right, A, lam, gamma,
    depth, width, n, bucket,
    left_0, left_1, right_0, right_1, A_0,
    RANK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    BASES: tl.constexpr = ROWS // PART
    PARTS: tl.constexpr = (RANK + PART - 1) // PART
    down, across = place(PARTS * tl.cdiv(n, BASES) * ROWS, width, ROWS, COLUMNS)
    first_basis, part = down // PARTS * BASES, down % PARTS
    bases, k = basis_and_row(first_basis, part * PART, RANK, PART, ROWS)
    valid = (bases < n) & (k < RANK)
    j = across * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = right.dtype.element_ty
    gradient = tl.zeros((ROWS, COLUMNS), tl.float32)  # of Ã
    for start in range(0, depth, DEPTH):
        t = start + tl.arange(0, DEPTH)
        factor = tl.trans(basis(left, t, bases * RANK + k, left_0, left_1, depth, valid, dtype))
        gradient = add_dot(factor, matrix(right, t, j, right_0, right_1, depth, width), gradient)

    weighted = gradient * matrix(A, k, j, A_0, 1, RANK, width).to(tl.float32)
    there = valid[:, None] & (j < width)[None, :]
    scale = tl.load(gamma + bases[:, None] * width + j[None, :], mask=there, other=0.0)
    tl.store(d_lam + (across * RANK + k) * n + bases, tl.sum(weighted * scale, 1), mask=valid)
    weighted *= tl.load(lam + k * n + bases, mask=valid, other=0.0)[:, None]
    sums = tl.sum(tl.reshape(weighted, (BASES, PART, COLUMNS)), 1)
    b = first_basis + tl.arange(0, BASES)
    at = d_gamma + (part * n + b)[:, None] * width + j[None, :]
    tl.store(at, sums, mask=(b < n)[:, None] & (j < width)[None, :])
