"""Kernels for products with Ã, which is formed tile by tile on the chip, and for sums of two products.

Tiles of the result are computed transposed, so that Ã is the left factor: matrix units take that one from registers,
where it is formed. All accumulate in float32 and round once. ``reference.py`` has the twin of each.
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
    converted,
    matrix,
    place,
    stochastic,
    strides,
    tuned,
)


def times_scaled(
    x: Tensor,  # (T, q), the dtype of out, or int8 codes
    A: Tensor,  # (r, ≥ m), the dtype of out, or int8 codes
    lam: Tensor,  # (r, n) float32
    gamma: Tensor,  # (n, m) float32
    out: Tensor,  # (T, m)
    base: Tensor | None,  # (T, m)
    first: tuple[Tensor, Tensor] | None,  # (T, k) and (k, m)
    bias: Tensor | None,  # (m,)
    seed: Tensor | None,  # (1,) int32
) -> None:
    """Writes x Ã (+ base) (+ first product) (+ bias) to ``out``, rounded stochastically where there is a seed."""
    (T, m), (r, n) = out.shape, lam.shape
    a, b = (None, None) if first is None else first
    _times_scaled[_grid(T, m)](
        *(out, x, A, lam, gamma, base, bias, a, b, seed),
        *(T, m, n, 0 if a is None else a.shape[1], bucket(T)),
        *strides(out, x, base, a, b),
        A.stride(0),
        RANK=r,
        POWER=triton.next_power_of_2(r),
        HAS_BASE=base is not None,
        HAS_FIRST=a is not None,
        HAS_BIAS=bias is not None,
        STOCHASTIC=seed is not None,
        **blocks(),
    )


def times_scaled_transposed(
    v: Tensor,  # (T, m)
    A: Tensor,  # (r, ≥ m), the dtype of v, or int8 codes
    lam: Tensor,  # (r, n) float32
    gamma: Tensor,  # (n, m) float32
    out: Tensor,  # (T, q)
) -> None:
    """Writes v Ãᵀ to ``out``."""
    (T, m), (r, n) = v.shape, lam.shape
    _times_scaled_transposed[lambda meta: (_tiles_of_bases(r, n, meta["COLUMNS"]) * triton.cdiv(T, meta["ROWS"]),)](
        *(out, v, A, lam, gamma, T, m, n, bucket(T)),
        *strides(out, v),
        A.stride(0),
        RANK=r,
        POWER=triton.next_power_of_2(r),
        **blocks(),
    )


def sum_of_products(
    out: Tensor,  # (T, j)
    first: tuple[Tensor, Tensor],  # (T, k) and (k, j)
    second: tuple[Tensor, Tensor] | None,  # (T, l) and (l, j), the right factor of both the dtype of out, or int8 codes
    bias: Tensor | None,  # (j,)
) -> None:
    """Writes the sum of the products and the bias to ``out``."""
    T, j = out.shape
    (a, b), (c, d) = first, (None, None) if second is None else second
    _sum_of_products[_grid(T, j)](
        *(out, a, b, c, d, bias),
        *(T, j, a.shape[1], 0 if c is None else c.shape[1], bucket(T)),
        *strides(out, a, b, c, d),
        HAS_SECOND=c is not None,
        HAS_BIAS=bias is not None,
        **blocks(),
    )


def _grid(rows: int, columns: int):
    return lambda meta: (triton.cdiv(rows, meta["ROWS"]) * triton.cdiv(columns, meta["COLUMNS"]),)


def _tiles_of_bases(rank: int, num_bases: int, tile: int) -> int:
    part = min(triton.next_power_of_2(rank), tile)
    return triton.cdiv(rank, part) * triton.cdiv(num_bases, tile // part)


_KEY = ["bucket", "width", "n", "RANK"]


@tuned("product", [*_KEY, "HAS_BASE", "HAS_FIRST", "STOCHASTIC"])
@triton.jit(do_not_specialize=["rows", "bucket"])
def _times_scaled(
    out, x, A, lam, gamma, base, bias, a, b, seed,
    rows, width, n, depth, bucket,
    out_0, out_1, x_0, x_1, base_0, base_1, a_0, a_1, b_0, b_1, A_0,
    RANK: tl.constexpr, POWER: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    down, across = place(rows, width, ROWS, COLUMNS)
    t = down * ROWS + tl.arange(0, ROWS)
    j = across * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = out.dtype.element_ty
    if HAS_BASE:  # first, when no other operand takes registers
        total = matrix(base, j, t, base_1, base_0, width, rows).to(tl.float32)
    else:
        total = tl.zeros((COLUMNS, ROWS), tl.float32)
    if HAS_FIRST:
        total = _add_product(total, a, b, t, j, rows, width, depth, a_0, a_1, b_0, b_1, DEPTH)

    PART: tl.constexpr = POWER if POWER < DEPTH else DEPTH
    for first_row in range(0, RANK, PART):
        _, k = basis_and_row(0, first_row, RANK, PART, DEPTH)
        shared = basis(A, j, k, 1, A_0, width, k < RANK, tl.float32)  # (j, i), the same for all bases
        for first_basis in range(0, n, DEPTH // PART):
            bases, _ = basis_and_row(first_basis, first_row, RANK, PART, DEPTH)
            valid = (bases < n) & (k < RANK)
            scale = tl.load(lam + k * n + bases, mask=valid, other=0.0)
            scaled = shared * scale[None, :] * basis(gamma, j, bases, 1, width, width, valid, tl.float32)
            right = tl.trans(basis(x, t, bases * RANK + k, x_0, x_1, rows, valid, dtype))
            total = add_dot(converted(scaled, dtype), right, total)

    where = (j < width)[:, None] & (t < rows)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + j, mask=j < width, other=0.0).to(tl.float32)[:, None]
    if STOCHASTIC:
        total = stochastic(total, t[None, :] * width + j[:, None], seed)
    at = out + j[:, None].to(tl.int64) * out_1 + t[None, :].to(tl.int64) * out_0
    tl.store(at, converted(total, dtype), mask=where)


@tuned("product", _KEY)
@triton.jit(do_not_specialize=["rows", "bucket"])
def _times_scaled_transposed(
    out, v, A, lam, gamma,
    rows, width, n, bucket,
    out_0, out_1, v_0, v_1, A_0,
    RANK: tl.constexpr, POWER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = POWER if POWER < COLUMNS else COLUMNS
    PARTS: tl.constexpr = (RANK + PART - 1) // PART
    tiles = PARTS * tl.cdiv(n, COLUMNS // PART)
    down, across = place(rows, tiles * COLUMNS, ROWS, COLUMNS)
    t = down * ROWS + tl.arange(0, ROWS)
    bases, k = basis_and_row(across // PARTS * (COLUMNS // PART), across % PARTS * PART, RANK, PART, COLUMNS)
    valid = (bases < n) & (k < RANK)
    dtype: tl.constexpr = out.dtype.element_ty
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in range(0, width, DEPTH):
        j = start + tl.arange(0, DEPTH)
        scaled = tl.trans(basis(A, j, k, 1, A_0, width, k < RANK, tl.float32))
        scaled *= tl.trans(basis(gamma, j, bases, 1, width, width, valid, tl.float32))
        total = add_dot(converted(scaled, dtype), tl.trans(matrix(v, t, j, v_0, v_1, rows, width)), total)
    total *= tl.load(lam + k * n + bases, mask=valid, other=0.0)[:, None]
    at = out + (bases * RANK + k)[:, None].to(tl.int64) * out_1 + t[None, :].to(tl.int64) * out_0
    tl.store(at, converted(total, dtype), mask=valid[:, None] & (t < rows)[None, :])


@tuned("product", ["bucket", "width", "depth", "second_depth"])
@triton.jit(do_not_specialize=["rows", "bucket"])
def _sum_of_products(
    out, a, b, c, d, bias,
    rows, width, depth, second_depth, bucket,
    out_0, out_1, a_0, a_1, b_0, b_1, c_0, c_1, d_0, d_1,
    HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    down, across = place(rows, width, ROWS, COLUMNS)
    t = down * ROWS + tl.arange(0, ROWS)
    j = across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    total = _add_product(total, a, b, t, j, rows, width, depth, a_0, a_1, b_0, b_1, DEPTH)
    if HAS_SECOND:
        total = _add_product(total, c, d, t, j, rows, width, second_depth, c_0, c_1, d_0, d_1, DEPTH)
    if HAS_BIAS:
        total += tl.load(bias + j, mask=j < width, other=0.0).to(tl.float32)[:, None]
    at = out + j[:, None].to(tl.int64) * out_1 + t[None, :].to(tl.int64) * out_0
    tl.store(at, converted(total, out.dtype.element_ty), mask=(j < width)[:, None] & (t < rows)[None, :])


@triton.jit
def _add_product(total, a, b, t, j, rows, width, depth, a_0, a_1, b_0, b_1, DEPTH: tl.constexpr):
    """``total`` (j, t) plus the transposed tile of a b; b may be codes."""
    dtype: tl.constexpr = a.dtype.element_ty
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        right = tl.trans(matrix(a, t, k, a_0, a_1, rows, depth))
        total = add_dot(converted(matrix(b, j, k, b_1, b_0, width, depth), dtype), right, total)
    return total
