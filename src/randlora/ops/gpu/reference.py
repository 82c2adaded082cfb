"""Products with Ã in plain torch: twins of the kernels in ``products.py`` and ``gradients.py``, and their derivatives.

Rows of Ã and columns of B stand basis by basis, i = b·r + k (``grouped.py``). Sums are formed in float32 and rounded
once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from randlora.ops import rounding
from randlora.ops.units import in_units


def scaled(A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    """Ã = λ·A·γ of shape (q, m), rows over (n, r), from A (r, ≥ m), λ (r, n) and γ (n, m), in the dtype of λ."""
    A = A[:, : gamma.shape[1]].to(lam.dtype)
    return (lam.T.unsqueeze(-1) * A * gamma.unsqueeze(1)).flatten(0, 1)


def times_scaled(
    x: Tensor,  # (T, q), ``dtype`` or int8 codes
    A: Tensor,  # (r, ≥ m), ``dtype`` or int8 codes
    lam: Tensor,  # (r, n)
    gamma: Tensor,  # (n, m)
    dtype: torch.dtype,
    base: Tensor | None = None,  # (T, m)
    a: Tensor | None = None,  # (T, k)
    b: Tensor | None = None,  # (k, m)
    bias: Tensor | None = None,  # (m,)
    seed: Tensor | None = None,  # (1,), int32
) -> Tensor:  # (T, m)
    """X Ã (+ base) (+ a b) (+ bias) in ``dtype``, rounded stochastically where there is a seed."""
    total = _numbers(x, dtype).to(lam.dtype) @ scaled(A, lam, gamma).to(dtype).to(lam.dtype)
    if base is not None:
        total = total + base
    if a is not None and b is not None:
        total = total + a.to(lam.dtype) @ b.to(lam.dtype)
    if bias is not None:
        total = total + bias
    return total.to(dtype) if seed is None else rounding.stochastic(total, seed)


def times_scaled_transposed(
    v: Tensor,  # (T, m)
    A: Tensor,  # (r, ≥ m), the dtype of v or int8 codes
    lam: Tensor,  # (r, n)
    gamma: Tensor,  # (n, m)
) -> Tensor:  # (T, q)
    """V Ãᵀ in the dtype of v."""
    return (v.to(lam.dtype) @ scaled(A, lam, gamma).T).to(v.dtype)


def sum_of_products(
    a: Tensor,  # (T, k)
    b: Tensor,  # (k, j), the dtype of a or int8 codes
    c: Tensor | None = None,  # (T, l)
    d: Tensor | None = None,  # (l, j), the dtype of a or int8 codes
    bias: Tensor | None = None,  # (j,)
) -> Tensor:  # (T, j)
    """A b (+ c d) (+ bias) in the dtype of a."""
    wide = torch.promote_types(a.dtype, torch.float32)
    total = a.to(wide) @ _numbers(b, a.dtype).to(wide)
    if c is not None and d is not None:
        total = total + c.to(wide) @ _numbers(d, a.dtype).to(wide)
    return (total if bias is None else total + bias).to(a.dtype)


def scaling_gradients(
    left: Tensor,  # (t, q), the dtype of right or int8 codes
    right: Tensor,  # (t, m)
    A: Tensor,  # (r, ≥ m)
    lam: Tensor,  # (r, n)
    gamma: Tensor,  # (n, m)
) -> tuple[Tensor, Tensor]:  # (r, n), (n, m)
    """dλ and dγ of dÃ = leftᵀ right, in the dtype of λ."""
    left = _numbers(left, right.dtype).to(lam.dtype)
    gradient = (left.T @ right.to(lam.dtype)).unflatten(0, lam.T.shape)  # (n, r, m)
    weighted = gradient * A[:, : gamma.shape[1]].to(lam.dtype)
    return (weighted * gamma.unsqueeze(1)).sum(-1).T, (weighted * lam.T.unsqueeze(-1)).sum(1)


def _numbers(B: Tensor, dtype: torch.dtype) -> Tensor:
    """What products in ``dtype`` read B as: codes count in its unit."""
    return B if B.is_floating_point() else in_units(B, dtype)
