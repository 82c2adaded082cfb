"""What the kernels share: the order of programs, tiles of the operands and of Ã, rounding, and choosing block sizes.

Rows of Ã and columns of B stand basis by basis here, i = b·r + k (``grouped.py``). A tile along i covers ``PART`` rows
k of ``TILE // PART`` bases, so that its piece of A is the same for all bases and stays on the chip; ``PART`` is a power
of two, and a rank that is none leaves the rest of a tile empty.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from randlora.ops.units import unit

interpreting: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on tensors of the CPU: TRITON_INTERPRET=1 before the first import."""

_INTERPRETING = tl.constexpr(interpreting)
_UNIT = tl.constexpr(unit(torch.float16))

# ROWS are tokens, or rows of B where ΔW is formed; the smallest tiles are for few of them.
CONFIGS: dict[str, list[dict[str, int]]] = {
    "product": [
        {"ROWS": 256, "COLUMNS": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 4},
        {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
        {"ROWS": 64, "COLUMNS": 128, "DEPTH": 32, "num_warps": 4, "num_stages": 4},
        {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 4},
    ],
    "reduction": [
        {"DEPTH": 64, "num_warps": 8, "num_stages": 3},
        {"DEPTH": 32, "num_warps": 8, "num_stages": 4},
    ],
}
_SMALL = {"ROWS": 32, "COLUMNS": 32, "DEPTH": 16}  # what the interpreter takes: several blocks in small tensors


def tuned(kind: str, key: list[str]) -> Any:
    """Decorates a kernel such that the fastest of ``CONFIGS[kind]`` is found once for each ``key`` and remembered."""
    configs = []
    for sizes in CONFIGS[kind]:
        tile = {name: size for name, size in sizes.items() if not name.startswith("num_")}
        configs.append(triton.Config(tile, num_warps=sizes["num_warps"], num_stages=sizes["num_stages"]))
    choose = triton.autotune(configs, key, prune_configs_by={"early_config_prune": _fitting}, cache_results=True)
    return (lambda kernel: kernel) if interpreting else choose


def _fitting(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Random bits, or codes that become numbers, would not fit into registers beside the largest tile."""
    codes = any(isinstance(value, torch.Tensor) and value.dtype == torch.int8 for value in arguments.values())
    return configs[1:] if codes or constants.get("STOCHASTIC") else configs


def blocks() -> dict[str, int]:
    """The block sizes where nothing is tuned."""
    return _SMALL if interpreting else {}


def bucket(rows: int) -> int:
    """``rows`` rounded up to a power of two: block sizes are tuned for that, not for each number of tokens."""
    return min(max(64, triton.next_power_of_2(rows)), 16384)


def strides(*tensors: torch.Tensor | None) -> Iterator[int]:
    """Both strides of each matrix, 0 for one that is not there."""
    for tensor in tensors:
        yield from (0, 0) if tensor is None else tensor.stride()


@triton.jit
def place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which tile this program makes: eight tiles of rows by turns, so that neighbours share what the cache holds."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    first = program // (8 * across) * 8
    high = min(down - first, 8)
    return first + program % (8 * across) % high, program % (8 * across) // high


@triton.jit
def matrix(start, rows, columns, row_step, column_step, row_end, column_end):
    """A tile of a matrix, zero outside of it."""
    at = start + rows[:, None].to(tl.int64) * row_step + columns[None, :].to(tl.int64) * column_step
    return tl.load(at, mask=(rows < row_end)[:, None] & (columns < column_end)[None, :], other=0.0)


@triton.jit
def basis(start, rows, columns, row_step, column_step, row_end, valid, dtype: tl.constexpr):
    """A tile of B, or of anything over i; ``valid`` says which columns exist, and codes become numbers."""
    at = start + rows[:, None].to(tl.int64) * row_step + columns[None, :].to(tl.int64) * column_step
    return converted(tl.load(at, mask=(rows < row_end)[:, None] & valid[None, :], other=0), dtype)


@triton.jit
def converted(values, dtype: tl.constexpr):
    """``values`` in ``dtype``: codes as numbers, in float16 those of B in its unit; float32 rounded to nearest."""
    if values.dtype == dtype:
        return values
    if values.dtype == tl.int8 and dtype == tl.float16:
        return (values.to(tl.float32) * _UNIT).to(dtype)
    values = values.to(tl.float32)
    if _INTERPRETING and dtype == tl.bfloat16:  # which cuts bits off
        bits = values.to(tl.uint32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def basis_and_row(first_basis, first_row, RANK: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr):
    """(b, k) of each place of a tile along i."""
    place_in_tile = tl.arange(0, TILE)
    return first_basis + place_in_tile // PART, first_row + place_in_tile % PART


@triton.jit
def add_dot(left, right, total):
    """``left @ right + total`` in float32."""
    if _INTERPRETING:  # which multiplies the bit patterns of bfloat16
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    return tl.dot(left, right, total)


@triton.jit
def stochastic(total, number, seed):
    """float32 values that are bfloat16 numbers, each a neighbour of what it was (``rounding.py`` has the twin)."""
    noise = _mixed(_mixed(number.to(tl.uint32)) ^ tl.load(seed).to(tl.uint32)) & 0xFFFF
    bits = total.to(tl.uint32, bitcast=True) + noise
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _mixed(x):
    """The finaliser of MurmurHash3: each bit of x changes each bit of the result about half of the time."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
