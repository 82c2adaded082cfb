"""The kernel of dλ and dγ: it reads dÃ once.

No float is added atomically: each program writes sums of its own, and those of dλ are then added in a fixed order, so
that the same inputs give the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from randlora.ops.gpu.launch import block, launch

BLOCK = block({"ROWS": 16, "COLUMNS": 256}, {"ROWS": 4, "COLUMNS": 16})


def scaling_gradients(
    d_scaled: Tensor,  # (r·n, m), half precision or float32
    A: Tensor,  # (r, 1, ≥ m), half precision or int8 codes
    lam: Tensor,  # (r, n)
    gamma: Tensor,  # (n, m)
) -> tuple[Tensor, Tensor]:  # (r, n), (n, m)
    """dλ and dγ from dÃ, summed in float32."""
    (r, n), m = lam.shape, gamma.shape[1]
    parts = triton.cdiv(m, BLOCK["COLUMNS"])
    d_lam = torch.empty((parts, r, n), dtype=torch.float32, device=A.device)
    d_gamma = torch.empty((n, m), dtype=torch.float32, device=A.device)
    arguments = (d_gamma, d_scaled, A, lam.contiguous(), gamma.contiguous(), r, n, m, *d_scaled.stride(), A.stride(0))
    launch(_scaling_gradients, (n, parts), d_lam, *arguments, **BLOCK)
    return (d_lam.sum(0) if parts != 1 else d_lam[0]), d_gamma


@triton.jit
def _scaling_gradients(
    d_lam, d_gamma, d_scaled, A, lam, gamma, r, n, m, d_0, d_1, A_0, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    b, part = tl.program_id(0), tl.program_id(1)
    j = part * COLUMNS + tl.arange(0, COLUMNS)
    across = tl.load(gamma + b.to(tl.int64) * m + j, mask=j < m, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, r, ROWS):
        k = start + tl.arange(0, ROWS)
        inside = (k < r)[:, None] & (j < m)[None, :]
        at = d_scaled + (k[:, None].to(tl.int64) * n + b) * d_0 + j[None, :].to(tl.int64) * d_1
        values = tl.load(A + k[:, None].to(tl.int64) * A_0 + j[None, :], mask=inside, other=0).to(tl.float32)
        weighted = tl.load(at, mask=inside, other=0.0).to(tl.float32) * values
        tl.store(d_lam + (part * r + k) * n + b, tl.sum(weighted * across[None, :], 1), mask=k < r)
        scale = tl.load(lam + k * n + b, mask=k < r, other=0.0).to(tl.float32)
        total += tl.sum(weighted * scale[:, None], 0)
    tl.store(d_gamma + b.to(tl.int64) * m + j, total, mask=j < m)
