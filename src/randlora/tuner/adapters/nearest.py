"""The adapter that is nearest to a sum of adapters with the same bases, by its coefficients.

In an adapter each basis b has the coefficients λ[:, b] ⊗ γ[b, :], a matrix (r, m) of rank one, which multiplies the
entries of A. A sum adds these matrices; the nearest matrices of rank one are the nearest adapter. For random bases
that is, on average, the adapter with the nearest update. For the bases at hand another one may have a nearer update.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from randlora.tuner.layers.base import RandLoraLayer

EXACT = 1e-6
"""Rounding of float32 parameters, relative to the terms of a sum: below it the sum counts as an adapter."""


class Fit(NamedTuple):
    """Parameters of a layer, and their error against the sum.

    Attributes:
        lam: λ (r, n), or a stack of them, the factor of the update included.
        gamma: γ (n, m), or a stack of them.
        residual: norm of the coefficients' error, relative to that of the terms.
    """

    lam: Tensor
    gamma: Tensor
    residual: float


def fit(layer: RandLoraLayer, weights: dict[str, float]) -> Fit:
    """Return λ and γ whose coefficients are nearest to those of the weighted sum of a layer's adapters.

    Args:
        layer: the layer.
        weights: the adapters that it carries, and their weights.
    """
    factors = {name: weight * layer.scaling[name] for name, weight in weights.items()}
    # by basis, one column for each adapter: the coefficients of basis b are columns[b] @ rows[b]; of a stack of
    # matrices, each has bases of its own
    lams = {name: layer.randlora_lambda[name].detach().double().mT.flatten(0, -2) for name in factors}
    columns = torch.stack([factor * lams[name] for name, factor in factors.items()], dim=2)
    rows = torch.stack([layer.randlora_gamma[name].detach().double().flatten(0, -2) for name in factors], dim=1)
    left, small_left = torch.linalg.qr(columns)  # (n, r, k), (n, k, N)
    right, small_right = torch.linalg.qr(rows.mT)  # (n, m, l), (n, l, N)
    U, S, Vh = torch.linalg.svd(small_left @ small_right.mT, full_matrices=False)
    u, sigma, v = (left @ U[:, :, :1]).squeeze(2), S[:, 0], (right @ Vh[:, :1].mT).squeeze(2)

    like = rows[:, 0]  # γ keeps the size and the sign of the first adapter's
    size = torch.linalg.vector_norm(like, dim=1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    size = torch.where((v * like).sum(1) < 0, -size, size)
    nothing = (sigma == 0).unsqueeze(1)
    lam = torch.where(nothing, 0.0, u * (sigma / size).unsqueeze(1))
    gamma = torch.where(nothing, like, v * size.unsqueeze(1))
    terms = (columns.square().sum(1) * rows.square().sum(2)).sum()  # not of the sum, in which terms may cancel
    missed = S[:, 1:].square().sum()
    residual = float((missed / terms).sqrt()) if terms > 0 else 0.0
    return Fit(
        lam.reshape(*layer.stack, -1, lam.shape[1]).mT, gamma.reshape(*layer.stack, -1, gamma.shape[1]), residual
    )
