"""Bases as the GPU's kernels read them, in half precision.

The columns of each basis stand side by side: column b·r + k is column k of B_b, where the stored B has it at k·n + b.
So a tile of B reads whole rows of memory, belongs to few bases, and the part of A that it needs is the same for all of
them. The order depends on n, so there is one copy for each number of bases in a model; the stored order is not needed
on the device then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.ops import plan
from randlora.ops.gpu import availability
from randlora.ops.operands import Beside
from randlora.ops.plan import Costs
from randlora.ops.precision import at_least_float32
from randlora.ops.units import unit


class GroupedBases(NamedTuple):
    """Dense or ternary bases whose products are computed by kernels. Ã stays λ and γ: kernels form it on the chip.

    Attributes:
        A: (r, m), half precision or int8 codes.
        B: (M, q), over (n, r), likewise; in float16 in its unit (``units.py``), and codes count in it.
        dtype: of the products, half precision.
    """

    A: Tensor
    B: Tensor
    dtype: torch.dtype

    def tensors(self) -> tuple[Tensor, ...]:
        """Return A and B."""
        return self[:2]

    def static(self) -> tuple[Any, ...]:
        """Return the dtype."""
        return self[2:]

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], static: tuple[Any, ...]) -> GroupedBases:
        """Return the operands of ``tensors()`` and ``static()``."""
        A, B = tensors
        return cls(A, B, *static)

    @property
    def unit(self) -> float:
        """The unit in which B stands."""
        return unit(self.dtype)

    @property
    def repays_holding(self) -> bool:
        """ΔW takes a product."""
        return True

    def ready(self) -> GroupedBases:
        """Return the operands: kernels read codes as they are."""
        return self

    def costs(self, tokens: int) -> Costs:
        """Return the costs of products with matrices."""
        (M, q), m, element = self.B.shape, self.A.shape[1], plan.rates.element
        return Costs("plain", tokens * q * m, tokens * q * M, q * m * M, element, element * q * (m + M))

    def scaled(self, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return λ and γ."""
        dtype = at_least_float32(lam.dtype)
        return lam.to(dtype), gamma.to(dtype)

    def weight(self, scaled: tuple[Tensor, Tensor], base: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Return B Ã (+ base)."""
        return self._kernels.times_scaled(self.B, self.A, *scaled, self.dtype, base, seed=seed)

    def times(self, rows: Tensor, update: Tensor, beside: Beside | None) -> Tensor:
        """Return ``rows @ update`` (+ the base layer's product)."""
        return self._sum(rows, update, beside)

    def widen(self, v: Tensor, scaled: tuple[Tensor, Tensor], beside: Beside | None) -> Tensor:
        """Return v Ãᵀ Bᵀ (+ the base layer's product)."""
        return self._sum(self._kernels.times_scaled_transposed(v, self.A, *scaled), self.B.T, beside)

    def project(self, u: Tensor, scaled: Any = None) -> Tensor:
        """Return u B, (T, q)."""
        return self._sum(u, self.B, None)

    def narrow(self, projected: Tensor, scaled: tuple[Tensor, Tensor], beside: Beside | None) -> Tensor:
        """Return u B Ã (+ the base layer's product)."""
        first = (None, None, None) if beside is None else (beside.rows, beside.weight.T, beside.bias)
        return self._kernels.times_scaled(projected, self.A, *scaled, self.dtype, None, *first)

    def from_tokens(
        self, u: Tensor, v: Tensor, lam: Tensor, gamma: Tensor, scaled: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return u B, dλ and dγ."""
        projected = self.project(u)
        return projected, *self._kernels.scaling_gradients(projected, v, self.A, *self.scaled(lam, gamma))

    def from_weight(self, d_weight: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return dλ and dγ."""
        return self._kernels.scaling_gradients(self.B, d_weight, self.A, *self.scaled(lam, gamma))

    def _sum(self, a: Tensor, b: Tensor, beside: Beside | None) -> Tensor:
        """``a @ b`` plus the base layer's product; a kernel reads codes as they are."""
        if beside is not None:
            return self._kernels.sum_of_products(beside.rows, beside.weight.T, a, b, beside.bias)
        return a @ b if a.dtype == b.dtype else self._kernels.sum_of_products(a, b)

    @property
    def _kernels(self) -> Any:
        """The module with the products, ``operators.py`` or its twin ``reference.py``."""
        return availability.kernels(self.B.device, self.dtype)


def grouped(B: Tensor, rank: int) -> Tensor:
    """Return B (M, q) with the columns of each basis side by side."""
    return B.unflatten(1, (rank, -1)).transpose(1, 2).flatten(1).contiguous()
