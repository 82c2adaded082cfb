"""Kernels that read and write each entry once: Ã, the codes of ternary bases as numbers, and W + ΔW rounded by chance.

Memory sets their pace. So blocks are constants, and nothing is tuned.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from randlora.ops.gpu.launch import block, in_units, launch, rounded

SCALED = block({"ROWS": 16, "COLUMNS": 256}, {"ROWS": 4, "COLUMNS": 16})
ROW = block({"COLUMNS": 1024}, {"COLUMNS": 32})
_PER_BYTE = 4


def scaled(
    A: Tensor,  # (r, 1, ≥ m), half precision or int8 codes
    lam: Tensor,  # (r, n)
    gamma: Tensor,  # (n, m)
    dtype: torch.dtype,
) -> Tensor:  # (r·n, m)
    """Ã = λ·A·γ, rows over (r, n), computed in float32 and rounded once."""
    (r, n), m = lam.shape, gamma.shape[1]
    out = torch.empty((r * n, m), dtype=dtype, device=A.device)
    rows, columns = SCALED["ROWS"], SCALED["COLUMNS"]
    grid = (n, triton.cdiv(m, columns), triton.cdiv(r, rows))
    launch(_scaled, grid, out, A, lam.contiguous(), gamma.contiguous(), r, n, m, A.stride(0), **SCALED)
    return out


def unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """All numbers of ``packed`` (rows, bytes), four to a byte (``codes.py``), in ``dtype`` and its unit."""
    rows, columns = packed.shape[0], packed.shape[1] * _PER_BYTE
    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    grid = (rows, triton.cdiv(columns, ROW["COLUMNS"]))
    launch(_unpacked, grid, out, packed, columns, packed.stride(0), **ROW)
    return out


def stochastic_sum(update: Tensor, base: Tensor, seed: Tensor) -> Tensor:
    """``update + base`` (i, j) in bfloat16, rounded as ``rounding.stochastic`` does."""
    rows, columns = update.shape
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=update.device)
    grid = (rows, triton.cdiv(columns, ROW["COLUMNS"]))
    launch(_stochastic_sum, grid, out, update, base, seed, columns, *update.stride(), *base.stride(), **ROW)
    return out


@triton.jit
def _scaled(out, A, lam, gamma, r, n, m, A_0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    b = tl.program_id(0)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inside = (k < r)[:, None] & (j < m)[None, :]
    scale = tl.load(lam + k * n + b, mask=k < r, other=0.0).to(tl.float32)
    across = tl.load(gamma + b.to(tl.int64) * m + j, mask=j < m, other=0.0).to(tl.float32)
    values = tl.load(A + k[:, None].to(tl.int64) * A_0 + j[None, :], mask=inside, other=0).to(tl.float32)
    values = scale[:, None] * values * across[None, :]
    at = out + (k[:, None].to(tl.int64) * n + b) * m + j[None, :]
    tl.store(at, rounded(values, out.dtype.element_ty), mask=inside)


@triton.jit
def _unpacked(out, packed, columns, packed_0, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    byte = tl.load(packed + row * packed_0 + j // 4, mask=j < columns, other=0).to(tl.int32)
    codes = ((byte >> (j % 4 * 2)) & 3) - 1
    tl.store(out + row * columns + j, in_units(codes.to(tl.float32), out.dtype.element_ty), mask=j < columns)


@triton.jit
def _stochastic_sum(
    out, update, base, seed, columns, update_0, update_1, base_0, base_1, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = j < columns
    total = tl.load(update + row * update_0 + j * update_1, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(base + row * base_0 + j * base_1, mask=inside, other=0.0).to(tl.float32)
    number = (row * columns + j).to(tl.uint32)
    noise = _mixed(_mixed(number) ^ tl.load(seed).to(tl.uint32)) & 0xFFFF
    bits = (total.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    tl.store(out + row * columns + j, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)


@triton.jit
def _mixed(x):
    """The finaliser of MurmurHash3: each bit of x changes each bit of the result about half of the time."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
