"""The pair of frozen bases as one layer multiplies with it.

Every plan needs the same few products of B (M, q) and Ã (q, m) with activations: ``v`` on the side of the layer that
is m wide and ``u`` on the side that is M wide. ``DenseBases`` computes them with matrices, ``SparseBases`` (in
``sparse.py``) without visiting zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from randlora.ops import bf16, codes
from randlora.ops.units import in_units

_IN_CACHE = 1 << 17  # numbers of a temporary that stays in a core's cache


class DenseBases(NamedTuple):
    """Bases as matrices, in one of three dtypes.

    That of the products; or bfloat16 for products in float32, which are exact (``bf16.py``); or ternary codes, of which
    a product takes a temporary copy in its own dtype. For products in float16, B stands in its unit (``units.py``).

    Attributes:
        A: (r, m); codes are int8.
        B: (M, q), over (n, r); codes are four to a byte (``codes.py``).
    """

    A: Tensor
    B: Tensor

    def ready(self, dtype: torch.dtype) -> DenseBases:
        """The same numbers such that products in ``dtype`` can take them."""
        if self.B.is_floating_point():
            return self
        return DenseBases(self.A, self.matrix(self.product_dtype(dtype)))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """B as it is stored, (M, q), in ``dtype`` and its unit."""
        return self._numbers(self.B, dtype)

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of B in products of ``dtype``."""
        if self.B.is_floating_point():
            return self.B.dtype
        return torch.bfloat16 if bf16.splits(self.B.shape[0] * self.columns, self.B.device, dtype) else dtype

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of B as it is stored, (*indices, q), in ``dtype`` and its unit."""
        return self._numbers(F.embedding(indices, self.B), dtype)

    def _numbers(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        if stored.is_floating_point():
            return in_units(stored, dtype)
        return codes.unpack(stored, self.columns, dtype)

    @property
    def columns(self) -> int:
        """Q = n·r with n = ceil(m / r)."""
        rank, min_dim = self.A.shape
        return -(-min_dim // rank) * rank

    def scaled(self, lam: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
        """Ã = λ·A·γ of shape (q, m), rows over (r, n), formed in the wider of the dtypes, returned in ``dtype``."""
        A = self.A.to(torch.promote_types(lam.dtype, dtype))
        scaled = torch.mul(lam.unsqueeze(-1), A.unsqueeze(1))
        # fresh memory of this size can cost more than what is written to it
        scaled = scaled * gamma if bf16.is_watched() else scaled.mul_(gamma)
        return scaled.flatten(0, 1).to(dtype)

    def weight(self, At: Tensor, base: Tensor | None = None) -> Tensor:
        """B Ã (+ base), (M, m), in the memory order of the base."""
        if base is not None and base.stride(1) != 1:
            return product(At.T, self.B.T, base.T).T
        return product(self.B, At, base)

    def basis_gradient(self, u: Tensor, v: Tensor) -> Tensor:
        """dÃ = Bᵀ (uᵀ v), (q, m), for u (T, M) and v (T, m), by way of the weight's gradient."""
        return product(self.B.T, u.T @ v)

    def scaling_gradients(self, dAt: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """dλ (r, n) and dγ (n, m) from dÃ, which is read once; summed in the wider of the dtypes."""
        dtype = torch.promote_types(lam.dtype, dAt.dtype)
        lam, gamma = lam.to(dtype), gamma.to(dtype)
        step = max(_IN_CACHE // max(gamma.numel(), 1), 1)
        d_lam, d_gamma = [], torch.zeros_like(gamma)
        blocks = (t.split(step) for t in (dAt.view(*lam.shape, -1), self.A.to(dtype), lam))
        for gradient, A, scale in zip(*blocks, strict=True):
            weighted = gradient.to(dtype) * A.unsqueeze(1)  # (rows, n, m)
            d_lam.append((weighted * gamma).sum(-1))
            d_gamma = d_gamma + (weighted * scale.unsqueeze(-1)).sum(0)
        return torch.cat(d_lam), d_gamma


def product(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """``a @ b (+ base)``; exact in float32 where one factor is a bfloat16 basis and the other float32."""
    if a.dtype != b.dtype:
        return bf16.split_mm(a, b, base)
    return a @ b if base is None else torch.addmm(base, a, b)
