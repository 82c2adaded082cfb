"""The kernel of dλ and dγ, which reads dÃ once.

No float is added atomically: each program writes its own sums, and those of dλ are then added in a fixed order. So the
same inputs give the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from randlora.ops.gpu.launch import Constants, blocks, launch

BLOCK = Constants({"ROWS": 16, "COLUMNS": 256}, {"ROWS": 4, "COLUMNS": 16})


def scaling_gradients(
    d_scaled: Tensor,  # (groups, ρ·n, m/groups), half precision or float32
    A: Tensor,  # (ρ, 1, ≥ m), floating point or int8 codes
    lam: Tensor,  # (groups·ρ, n)
    gamma: Tensor,  # (n, m)
) -> tuple[Tensor, Tensor]:  # (groups·ρ, n), (n, m)
    """Return dλ and dγ from dÃ, summed in float32; dense bases are one group."""
    (groups, _, group), (r, n), m = d_scaled.shape, lam.shape, gamma.shape[1]
    parts = blocks(group, BLOCK.columns)
    d_lam = torch.empty((parts, r, n), dtype=torch.float32, device=A.device)
    d_gamma = torch.empty((n, m), dtype=torch.float32, device=A.device)
    tensors = (d_lam, d_gamma, d_scaled, A, lam.contiguous(), gamma.contiguous())
    sizes = (r // groups, n, m, group, r * n, *d_scaled.stride(), A.stride(0))
    launch(_scaling_gradients, (n, parts, groups), tensors, sizes, BLOCK)
    return (d_lam.sum(0) if parts != 1 else d_lam[0]), d_gamma


@triton.jit
def _scaling_gradients(
    d_lam, d_gamma, d_scaled, A, lam, gamma,
    r, n, m, group, all_lam, d_0, d_1, d_2, A_0,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b, part, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    within = part * COLUMNS + tl.arange(0, COLUMNS)
    j = i * group + within
    across = tl.load(gamma + b.to(tl.int64) * m + j, mask=within < group, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, r, ROWS):
        k = start + tl.arange(0, ROWS)
        inside = (k < r)[:, None] & (within < group)[None, :]
        at = d_scaled + i * d_0 + (k[:, None].to(tl.int64) * n + b) * d_1 + within[None, :].to(tl.int64) * d_2
        values = tl.load(A + k[:, None].to(tl.int64) * A_0 + j[None, :], mask=inside, other=0).to(tl.float32)
        weighted = tl.load(at, mask=inside, other=0.0).to(tl.float32) * values
        place = (i * r + k) * n + b
        tl.store(d_lam + part * all_lam + place, tl.sum(weighted * across[None, :], 1), mask=k < r)
        scale = tl.load(lam + place, mask=k < r, other=0.0).to(tl.float32)
        total += tl.sum(weighted * scale[:, None], 0)
    tl.store(d_gamma + b.to(tl.int64) * m + j, total, mask=within < group)
