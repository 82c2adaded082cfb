"""Bases as the GPU's kernels read them, and the adapted product by way of the kernels.

The columns of each basis stand side by side: column b·r + k is column k of B_b, where the stored B has it at k·n + b.
So a tile of B reads whole rows of memory, belongs to few bases, and the part of A that it needs is the same for all of
them. The order depends on n, so there is one copy for each number of bases in a model; the stored order is not needed
on the device then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from randlora.ops.plan import Plan


class GroupedBases(NamedTuple):
    """Dense or ternary bases for products in half precision.

    Attributes:
        A: (r, ≥ m), half precision or int8 codes.
        B: (M, q), over (n, r), likewise; in float16 in its unit (``units.py``), and codes count in it.
    """

    A: Tensor
    B: Tensor


def grouped(B: Tensor, rank: int) -> Tensor:
    """B (M, q) with the columns of each basis side by side."""
    return B.unflatten(1, (rank, -1)).transpose(1, 2).flatten(1).contiguous()


class Adapted(NamedTuple):
    """One adapted layer for the time of a call.

    Attributes:
        bases: its slices of the shared bases.
        lam: (r, n).
        gamma: (n, m).
        scaling: factor of the update.
        weight: (out, in), in the dtype of the products; ``None`` where only the update is wanted.
        wide: whether out < in.
        seed: (1,), for W + ΔW rounded stochastically, the same forward and backward.
        kernels: the module with the products, ``triton_ops`` or its twin ``scaled``.
    """

    bases: GroupedBases
    lam: Tensor
    gamma: Tensor
    scaling: float
    weight: Tensor | None
    wide: bool
    seed: Tensor | None
    kernels: Any

    def output(self, x: Tensor, way: str, bias: Tensor | None) -> Tensor:
        """X (W + ΔW)ᵀ + bias, (T, in) to (T, out)."""
        weight = None if self.weight is None else self.weight.T
        return self._product(x, weight, bias, self.wide, way, None)

    def gradients(self, x: Tensor, g: Tensor, plan: Plan, needs_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """dx (T, in), and dλ and dγ before the scaling, of an output's gradient g (T, out)."""
        u, v = (x, g) if self.wide else (g, x)
        projected = None
        if plan.grad_basis == "weight":
            left, right = self.bases.B, u.T @ v
        else:
            left = projected = self._through_B(u)
            right = v
        d_lam, d_gamma = self.kernels.scaling_gradients(left, right, self.bases.A, self.lam, self.gamma)
        if not needs_x:
            return None, d_lam, d_gamma
        shared = None if self.wide else projected
        return self._product(g, self.weight, None, not self.wide, plan.grad_input, shared), d_lam, d_gamma

    def _product(
        self,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        to_narrow: bool,
        way: str,
        projected: Tensor | None,
    ) -> Tensor:
        """Rows times weight and update: (T, M) to (T, m) if ``to_narrow``, else (T, m) to (T, M)."""
        scaled = (self.bases.A, self.lam * self.scaling, self.gamma)
        if way == "token":
            if to_narrow:
                projected = self._through_B(rows) if projected is None else projected
                first = (None, None) if weight is None else (rows, weight)
                return self.kernels.times_scaled(projected, *scaled, rows.dtype, None, *first, bias)
            second = (self.kernels.times_scaled_transposed(rows, *scaled), self.bases.B.T)
        else:
            base = None
            if way == "fused" and weight is not None:
                base = weight if to_narrow else weight.T
            summed = self.kernels.times_scaled(
                self.bases.B, *scaled, rows.dtype, base, seed=None if base is None else self.seed
            )
            second = (rows, summed if to_narrow else summed.T)
            if base is not None:
                return F.linear(rows, second[1].T, bias)
        if weight is None:
            return self._plain(*second)
        return self.kernels.sum_of_products(rows, weight, *second, bias)

    def _through_B(self, u: Tensor) -> Tensor:  # (T, M) -> (T, q)
        return self._plain(u, self.bases.B)

    def _plain(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b``; a kernel reads codes as they are."""
        return a @ b if a.dtype == b.dtype else self.kernels.sum_of_products(a, b)
