"""The kernel of a sum of two products in half precision, which is rounded once.

cuBLAS computes single products. For a sum, torch would have to join the factors in memory or keep it in float32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from randlora.ops.gpu.launch import INTERPRETING, Constants, blocks, interpreting, launch, rounded

LARGE = {"ROWS": 128, "COLUMNS": 256, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
SMALL = {"ROWS": 64, "COLUMNS": 128, "DEPTH": 64, "num_warps": 4, "num_stages": 4}
_ENOUGH = 256  # large blocks that occupy a large GPU's multiprocessors about twice
_INTERPRETED = {"ROWS": 32, "COLUMNS": 32, "DEPTH": 16}


def rounded_sum(
    a: Tensor,  # (T, k)
    b: Tensor,  # (k, j)
    c: Tensor | None,  # (T, l)
    d: Tensor | None,  # (l, j)
    addend: Tensor | None,  # (T, j), of any floating point dtype
) -> Tensor:  # (T, j)
    """Return ``a @ b + c @ d + addend`` in the dtype of a."""
    rows, columns = a.shape[0], b.shape[1]
    out = a.new_empty(rows, columns)
    depth, second, strides = a.shape[1], 0, (*a.stride(), *b.stride())
    if c is not None and d is not None:
        second, strides = c.shape[1], (*strides, *c.stride(), *d.stride())
    else:
        strides = (*strides, 0, 0, 0, 0)
    strides = (*strides, 0, 0) if addend is None else (*strides, *addend.stride())
    large = blocks(rows, LARGE["ROWS"]) * blocks(columns, LARGE["COLUMNS"]) >= _ENOUGH and _has_room(a.device)
    constants = _constants(large, c is not None, addend is not None)
    grid = (blocks(rows, constants.rows) * blocks(columns, constants.columns), 1, 1)
    sizes = (columns, depth, second, *strides)
    launch(_rounded_sum, grid, (out, a, b, c, d, addend), sizes, constants, rows=(rows,))
    return out


@cache
def _constants(large: bool, has_second: bool, has_addend: bool) -> Constants:
    """Return the constants for a result: large blocks read less, small ones occupy a device with few tokens."""
    flags = {"HAS_SECOND": has_second, "HAS_ADDEND": has_addend}
    return Constants(flags | (LARGE if large else SMALL), flags | _INTERPRETED)


@cache
def _has_room(device: torch.device) -> bool:
    """Return whether a multiprocessor has shared memory for the tiles of large blocks, as on A100, H100 and later."""
    needed = (LARGE["ROWS"] + LARGE["COLUMNS"]) * LARGE["DEPTH"] * LARGE["num_stages"] * 2
    return interpreting or torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor > needed


@triton.jit(do_not_specialize=["rows"])
def _rounded_sum(
    out, a, b, c, d, addend,
    rows, columns, depth, second_depth,
    a_0, a_1, b_0, b_1, c_0, c_1, d_0, d_1, addend_0, addend_1,
    HAS_SECOND: tl.constexpr, HAS_ADDEND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    down, across = _place(rows, columns, ROWS, COLUMNS)
    t = down * ROWS + tl.arange(0, ROWS)
    j = across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = _add_product(total, a, b, t, j, rows, columns, depth, a_0, a_1, b_0, b_1, DEPTH)
    if HAS_SECOND:
        total = _add_product(total, c, d, t, j, rows, columns, second_depth, c_0, c_1, d_0, d_1, DEPTH)
    if HAS_ADDEND:
        total += _tile(addend, t, j, addend_0, addend_1, rows, columns).to(tl.float32)
    at = out + t[:, None].to(tl.int64) * columns + j[None, :]
    inside = (t < rows)[:, None] & (j < columns)[None, :]
    tl.store(at, rounded(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which tile this program makes: eight tiles of rows by turns, so that neighbours share what the cache holds."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    first = program // (8 * across) * 8
    high = min(down - first, 8)
    return first + program % (8 * across) % high, program % (8 * across) // high


@triton.jit
def _add_product(total, a, b, t, j, rows, columns, depth, a_0, a_1, b_0, b_1, DEPTH: tl.constexpr):
    """``total`` plus the tile (t, j) of a b."""
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left, right = _tile(a, t, k, a_0, a_1, rows, depth), _tile(b, k, j, b_0, b_1, depth, columns)
        if INTERPRETING:  # the interpreter multiplies the bit patterns of bfloat16
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total)
    return total


@triton.jit
def _tile(start, rows, columns, row_step, column_step, row_end, column_end):
    """A tile of a matrix, zero outside of it."""
    at = start + rows[:, None].to(tl.int64) * row_step + columns[None, :].to(tl.int64) * column_step
    return tl.load(at, mask=(rows < row_end)[:, None] & (columns < column_end)[None, :], other=0.0)
