"""The formula of RandLoRA as a loop: the reference for all other files of this folder."""

from __future__ import annotations

import torch


def delta_weight(
    A: torch.Tensor,  # (r, ≥ m)
    B: torch.Tensor,  # (≥ M, ≥ n·r)
    lam: torch.Tensor,  # (r, n)
    gamma: torch.Tensor,  # (n, m)
    scaling: float,
    out_features: int,
    in_features: int,
) -> torch.Tensor:  # (out, in)
    """Return ΔW = scaling · Σ_b B_b diag(λ_b) A diag(γ_b), transposed where out < in (paper, section 4.2).

    PEFT flattens B over (n, r) and the scaled A over (r, n) before it multiplies them, so that column k of B_b is
    column k·n + b of the flattened B. With this pairing, PEFT and this library read the same update from a file.
    """
    r, n = lam.shape
    m, M = min(out_features, in_features), max(out_features, in_features)
    bases = B[:M, : n * r].reshape(M, r, n)
    update = torch.zeros(M, m, dtype=torch.promote_types(A.dtype, lam.dtype), device=A.device)
    for b in range(n):
        update += bases[:, :, b].to(update) @ torch.diag(lam[:, b]) @ A[:, :m].to(update) @ torch.diag(gamma[b])
    return scaling * (update if out_features >= in_features else update.T)


def linear(
    x: torch.Tensor,  # (..., in)
    weight: torch.Tensor,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    update: torch.Tensor,  # (out, in)
) -> torch.Tensor:  # (..., out)
    """Return the output of the adapted layer: x (W + ΔW)ᵀ + bias."""
    y = x @ weight.T + x @ update.T
    return y if bias is None else y + bias
