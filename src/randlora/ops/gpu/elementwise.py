"""Kernels that read and write each entry once: Ã, mixed groups, and W + ΔW rounded stochastically.

Memory limits their speed, so that block sizes are constants and need no tuning.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from randlora.ops.gpu.launch import Constants, blocks, launch, rounded

SCALED = Constants({"ROWS": 16, "COLUMNS": 256}, {"ROWS": 4, "COLUMNS": 16})
ROW = Constants({"COLUMNS": 1024}, {"COLUMNS": 32})


def scaled(
    A: Tensor,  # (ρ, 1, ≥ m), floating point or int8 codes
    lam: Tensor,  # (groups·ρ, n)
    gamma: Tensor,  # (n, m)
    dtype: torch.dtype,
    groups: int = 1,
) -> Tensor:  # (ρ·n, m)
    """Return Ã = λ·A·γ, rows over (ρ, n), computed in float32 and rounded once; each group of columns has rows of λ."""
    (r, n), m = lam.shape, gamma.shape[1]
    rho, group = r // groups, m // groups
    out = torch.empty((rho * n, m), dtype=dtype, device=A.device)
    grid = (n, groups * blocks(group, SCALED.columns), blocks(rho, SCALED.rows))
    tensors = (out, A, lam.contiguous(), gamma.contiguous())
    launch(_scaled, grid, tensors, (rho, n, m, group, A.stride(0)), SCALED)
    return out


def stochastic_sum(update: Tensor, base: Tensor, seed: Tensor) -> Tensor:
    """Return ``update + base`` (i, j) in bfloat16, rounded as by ``rounding.stochastic``."""
    rows, columns = update.shape
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=update.device)
    grid = (rows, blocks(columns, ROW.columns), 1)
    sizes = (columns, *update.stride(), *base.stride())
    launch(_stochastic_sum, grid, (out, update, base, seed), sizes, ROW)
    return out


def mixed(values: Tensor, mix: Tensor) -> Tensor:
    """Return ``mix @ values`` for values (T, g, k) of any strides: contiguous, summed in float32, rounded once."""
    tokens, g, k = values.shape
    out = torch.empty((tokens, g, k), dtype=values.dtype, device=values.device)
    constants = _of_groups(g)
    grid = (tokens, blocks(k, constants.columns), 1)
    sizes = (k, *values.stride(), *mix.stride())
    launch(_mixed_groups, grid, (out, values, mix), sizes, constants)
    return out


@cache
def _of_groups(g: int) -> Constants:
    return Constants({"G": g, "COLUMNS": 256}, {"G": g, "COLUMNS": 16})


@triton.jit
def _mixed_groups(
    out, values, mix, k, values_0, values_1, values_2, mix_0, mix_1, G: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, G)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((G, COLUMNS), tl.float32)
    for i in range(G):
        sign = tl.load(mix + a * mix_0 + i * mix_1).to(tl.float32)
        row = tl.load(values + t * values_0 + i * values_1 + column * values_2, mask=column < k, other=0.0)
        total += sign[:, None] * row.to(tl.float32)[None, :]
    at = out + (t * G + a[:, None]) * k + column[None, :]
    tl.store(at, rounded(total, out.dtype.element_ty), mask=(a < G)[:, None] & (column < k)[None, :])


@triton.jit
def _scaled(out, A, lam, gamma, r, n, m, group, A_0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    b = tl.program_id(0)
    parts = tl.cdiv(group, COLUMNS)  # of a group; no block of columns crosses its edge
    i, within = tl.program_id(1) // parts, tl.program_id(1) % parts * COLUMNS + tl.arange(0, COLUMNS)
    j = i * group + within
    k = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inside = (k < r)[:, None] & (within < group)[None, :]
    scale = tl.load(lam + (i * r + k) * n + b, mask=k < r, other=0.0).to(tl.float32)
    across = tl.load(gamma + b.to(tl.int64) * m + j, mask=within < group, other=0.0).to(tl.float32)
    values = tl.load(A + k[:, None].to(tl.int64) * A_0 + j[None, :], mask=inside, other=0).to(tl.float32)
    values = scale[:, None] * values * across[None, :]
    at = out + (k[:, None].to(tl.int64) * n + b) * m + j[None, :]
    tl.store(at, rounded(values, out.dtype.element_ty), mask=inside)


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
