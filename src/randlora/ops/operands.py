"""One layer's frozen factors in the form that its products read: the protocol of every kind of basis.

Names follow the formula: ``v`` (T, m) are activations on the side of the layer that is m = min(out, in) wide, ``u``
(T, M) those on the side that is M wide. Ã = λ·A·γ, as a matrix (q, m), and ΔW = B Ã, (M, m). A kind may keep Ã in
any form (its non-zeros, its blocks, λ and γ alone), which only the kind itself reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from randlora.ops import bf16
from randlora.ops.bf16 import sum_of_products
from randlora.ops.plan import Costs
from randlora.ops.precision import WIDE


class Sizes(NamedTuple):
    """The sizes of a layer's slices.

    Attributes:
        max_dim: M, rows of B.
        min_dim: m, columns of A.
        num_bases: n; B has n·r columns.
    """

    max_dim: int
    min_dim: int
    num_bases: int


class Beside(NamedTuple):
    """The base layer's product, which is added to the update's.

    Attributes:
        rows: (T, k).
        matrix: (k, j), in the dtype of the rows.
        bias: (j,), likewise.
    """

    rows: Tensor
    matrix: Tensor
    bias: Tensor | None

    def product(self) -> Tensor:
        """Return ``rows @ matrix + bias``."""
        if self.bias is None:
            return torch.mm(self.rows, self.matrix)
        return torch.addmm(self.bias, self.rows, self.matrix)


class Operands(Protocol):
    """A layer's slices of A and B, for products in one dtype on one device.

    Results are in that dtype, except dλ and dγ, which are in float32 or wider. Methods use only operations that torch
    can differentiate and map.
    """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""

    @property
    def unit(self) -> float:
        """The factor that the entries of B contain, by which A or λ has to be divided."""

    def scaled_by(self, scaling: float) -> Operands:
        """Return the operands with ``scaling`` / ``unit`` multiplied into A, which becomes float32 or wider."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors, for a compiler or a transform that has to see each one."""

    def static(self) -> tuple[Any, ...]:
        """Return the further arguments of ``of``: plain hashable values."""

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], static: tuple[Any, ...]) -> Operands:
        """Return the operands that gave ``tensors()`` and ``static()``."""

    def ready(self) -> Operands:
        """Return the operands with packed numbers unpacked, for one call."""

    def costs(self, tokens: int) -> Costs:
        """Return the costs of the products for so many tokens."""

    def scaled(self, lam: Tensor, gamma: Tensor) -> Any:
        """Return Ã = λ·A·γ for λ (r, n) and γ (n, m). Here and below, A or λ includes the scaling."""

    def weight(self, scaled: Any, base: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Return B Ã (+ base), (M, m), in the memory order of the base; with a seed, rounded stochastically."""

    def times(self, rows: Tensor, update: Tensor, beside: Beside | None) -> Tensor:
        """Return ``rows @ update`` (+ the base layer's product) for ``weight(...)`` or its transpose as ``update``."""

    def widen(self, v: Tensor, scaled: Any, beside: Beside | None) -> Tensor:
        """Return v Ãᵀ Bᵀ (+ the base layer's product), (T, m) to (T, M)."""

    def project(self, u: Tensor, scaled: Any) -> Any:
        """Return u B, or a further step towards u B Ã, depending on the kind; the input of ``narrow``."""

    def narrow(self, projected: Any, scaled: Any, beside: Beside | None) -> Tensor:
        """Return u B Ã (+ the base layer's product), (T, M) to (T, m)."""

    def from_tokens(
        self, u: Tensor, v: Tensor, lam: Tensor, gamma: Tensor, scaled: Any = None
    ) -> tuple[Any, Tensor, Tensor]:
        """Return ``project(u)``, dλ and dγ, from dÃ = (u B)ᵀ v.

        Without ``scaled``, the projection may be ``None``.
        """

    def from_weight(self, d_weight: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return dλ (r, n) and dγ (n, m) from dÃ = Bᵀ dW for dW (M, m)."""


def product(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """Return ``a @ b (+ base)``; exact in float32 where one factor is a bfloat16 basis and the other float32."""
    if a.dtype != b.dtype:
        return bf16.split_mm(a, b, base)
    return a @ b if base is None else torch.addmm(base, a, b)


def with_base(a: Tensor, b: Tensor, beside: Beside | None) -> Tensor:
    """Return ``a @ b`` plus the base layer's product; in half precision the sum is rounded once."""
    if beside is None:
        return product(a, b)
    if beside.rows.dtype not in WIDE:
        return sum_of_products([beside[:2], (a, b)], beside.bias)
    return product(a, b, beside.product())


def added(update: Tensor, beside: Beside | None, dtype: torch.dtype) -> Tensor:
    """Return ``update``, in any dtype, plus the base layer's product, rounded once to ``dtype``."""
    if beside is None:
        return update.to(dtype)
    if beside.rows.dtype not in WIDE:
        return sum_of_products([beside[:2]], beside.bias, update)
    return beside.product() + update
