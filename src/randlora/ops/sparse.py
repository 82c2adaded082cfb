"""Products with very sparse bases that skip the zeros, on CPU.

B is multiplied as a CSR matrix. A keeps, for each of its rows, the columns that are not zero: Ã has its non-zeros in
the same columns for all bases, so that everything on the A side is a batch of small dense products over the rows of A.
Tokens pass in blocks, since a block's activations stay in a core's cache while the non-zeros wander over them.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.ops.bf16 import BySample, call

_BLOCK = 256  # tokens, or columns of a dense matrix

with warnings.catch_warnings():  # torch says once that its CSR tensors are young
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


class Csr(NamedTuple):
    """A sparse matrix and its transpose, in compressed rows.

    Attributes:
        rows: offsets of the rows, int32.
        columns: column of each non-zero, int32.
        values: the non-zeros.
        t_rows: as ``rows``, of the transpose.
        t_columns: as ``columns``, of the transpose.
        t_values: as ``values``, of the transpose.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    t_rows: Tensor
    t_columns: Tensor
    t_values: Tensor

    @property
    def T(self) -> Csr:
        """The transpose."""
        return Csr(*self[3:], *self[:3])

    def matmul(self, matrix: Tensor, base: Tensor | None = None) -> Tensor:
        """``self @ matrix (+ base)``."""
        return call(_CsrMM, torch.ops.randlora.csr_mm, *self, matrix, base)


class SparseBases(NamedTuple):
    """A by the columns of its non-zeros, padded with zeros to equal length P, and B as CSR.

    ``v`` are activations on the side of the layer that is m wide, ``u`` those on the side that is M wide. Ã is kept at
    the non-zeros of A only: (r, n, P).

    Attributes:
        columns: (r, P), int64.
        values: (r, P), of the dtype in which everything here is computed.
        places: (m, r·P), ones that sum up what belongs to one column.
        B: (M, q).
        min_dim: m.
    """

    columns: Tensor
    values: Tensor
    places: Csr
    B: Csr
    min_dim: int

    @property
    def density(self) -> tuple[float, float]:
        """Shares of the entries of A (padding included) and of B that the products visit."""
        entries = (self.B.rows.shape[0] - 1) * (self.B.t_rows.shape[0] - 1)
        return self.columns.shape[1] / max(self.min_dim, 1), self.B.values.shape[0] / max(entries, 1)

    def scaled(self, lam: Tensor, gamma: Tensor, _dtype: torch.dtype) -> Tensor:
        """Ã = λ·A·γ, (r, n, P), in the dtype of ``values``."""
        return (lam.unsqueeze(-1) * self.values.unsqueeze(1) * self._at_columns(gamma)).to(self.values.dtype)

    def weight(self, At: Tensor, base: Tensor | None = None) -> Tensor:
        """B Ã (+ base), (M, m), in the memory order of the base."""
        places = self.columns.unsqueeze(1).expand_as(At)
        dense = At.new_zeros(*At.shape[:2], self.min_dim).scatter_add_(2, places, At)
        return self.B.matmul(dense.flatten(0, 1), base)

    def basis_gradient(self, u: Tensor, v: Tensor) -> Tensor:
        """dÃ = Bᵀ (uᵀ v) at the non-zeros of A, (r, n, P), by way of the weight's gradient."""
        d_weight = (u.T @ v).to(self.values.dtype)
        whole = self.B.T.matmul(d_weight).view(self.columns.shape[0], -1, self.min_dim)
        return whole.gather(2, self.columns.unsqueeze(1).expand(-1, whole.shape[1], -1))

    def spread(self, v: Tensor, At: Tensor) -> Tensor:
        """v Ãᵀ Bᵀ, (T, m) to (T, M)."""
        inner = ((At @ self._selected(block).permute(1, 2, 0)).flatten(0, 1) for block in v.split(_BLOCK))  # (q, t)
        return _joined([self.B.matmul(block) for block in inner])

    def gather(self, u: Tensor, At: Tensor) -> Tensor:
        """u B Ã, (T, M) to (T, m)."""
        return _joined([self._collected(self._projected(block), At) for block in u.split(_BLOCK)])

    def token_gradients(self, u: Tensor, v: Tensor, At: Tensor, gathers: bool) -> tuple[Tensor | None, Tensor]:
        """u B Ã if ``gathers``, and dÃ = (u B)ᵀ v at the non-zeros of A, (r, n, P)."""
        total, gathered = torch.zeros_like(At), []
        for u_block, v_block in zip(u.split(_BLOCK), v.split(_BLOCK), strict=True):
            projected = self._projected(u_block)
            total = torch.baddbmm(total, projected, self._selected(v_block).transpose(0, 1))
            if gathers:
                gathered.append(self._collected(projected, At))
        return _joined(gathered) if gathers else None, total

    def scaling_gradients(self, dAt: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """dλ (r, n) and dγ (n, m) from dÃ at the non-zeros of A."""
        weighted = dAt * self.values.unsqueeze(1)
        d_lam = (weighted * self._at_columns(gamma)).sum(-1)
        per_basis = (weighted * lam.unsqueeze(-1)).transpose(0, 1).flatten(1)  # (n, r·P)
        d_gamma = per_basis.new_zeros(gamma.shape).index_add(1, self.columns.flatten(), per_basis)
        return d_lam, d_gamma

    def _at_columns(self, gamma: Tensor) -> Tensor:  # (n, m) -> (r, n, P)
        r, P = self.columns.shape
        return gamma.index_select(1, self.columns.flatten()).view(-1, r, P).transpose(0, 1)

    def _selected(self, v: Tensor) -> Tensor:  # (t, m) -> (t, r, P)
        return v.index_select(1, self.columns.flatten()).view(-1, *self.columns.shape).to(self.values.dtype)

    def _projected(self, u: Tensor) -> Tensor:  # (t, M) -> (r, n, t)
        projected = self.B.T.matmul(u.T.to(self.values.dtype))
        return projected.unflatten(0, (self.columns.shape[0], -1))

    def _collected(self, projected: Tensor, At: Tensor) -> Tensor:  # (r, n, t) -> (m, t)
        return self.places.matmul((At.transpose(1, 2) @ projected).flatten(0, 1))


def _joined(blocks: list[Tensor]) -> Tensor:  # (k, t) each -> (T, k)
    # each turned by itself: torch turns a whole contiguous matrix several times faster than a part of one
    turned = [block.T.contiguous() for block in blocks]
    return turned[0] if len(turned) == 1 else torch.cat(turned)


def _compress(matrix: Tensor) -> Csr:
    """CSR form of a dense matrix and of its transpose."""
    return Csr(*_compressed(matrix), *_compressed(matrix.T))


def sparse_bases(A: Tensor, B: Tensor) -> SparseBases:
    """The form in which A (r, m) and B (M, q), given with their zeros, are multiplied without them."""
    columns, values = _padded_rows(A)
    return SparseBases(columns, values, _places(columns, values.dtype, A.shape[1]), _compress(B), A.shape[1])


def _padded_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (r, P) and values (r, P) of the non-zeros of each row, P ≥ 1 the most that a row has."""
    present = matrix != 0
    width = max(int(present.sum(1).max()), 1) if matrix.numel() else 1
    # the columns of non-zeros first, in their order
    columns = torch.argsort((~present).to(torch.uint8), dim=1, stable=True)[:, :width].contiguous()
    return columns, matrix.gather(1, columns)


def _places(columns: Tensor, dtype: torch.dtype, min_dim: int) -> Csr:
    """The matrix (m, r·P) with a one at (columns[j], j) for each j."""
    flat = columns.flatten()
    offsets = torch.cat([flat.new_zeros(1), torch.bincount(flat, minlength=min_dim).cumsum(0)])
    order, every = torch.argsort(flat, stable=True), torch.arange(flat.numel() + 1, device=flat.device)
    ones = torch.ones(flat.numel(), dtype=dtype, device=flat.device)  # twice: Dynamo takes no tensor in two places
    return Csr(offsets.int(), order.int(), ones, every.int(), flat.int(), ones.clone())


def _compressed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = matrix.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=matrix.shape[0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return offsets.int(), columns.int(), matrix[rows, columns]


# The transpose comes along because the gradient needs it.
torch.library.define(
    "randlora::csr_mm",
    "(Tensor rows, Tensor columns, Tensor values, Tensor t_rows, Tensor t_columns, Tensor t_values,"
    " Tensor matrix, Tensor? base) -> Tensor",
)


@torch.library.impl("randlora::csr_mm", "CPU")
def _csr_mm(
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    t_rows: Tensor,
    t_columns: Tensor,
    t_values: Tensor,
    matrix: Tensor,
    base: Tensor | None,
) -> Tensor:
    out = _start(rows, matrix, base)
    if not values.numel() or not matrix.numel():
        return out.zero_() if base is None else out
    shape = (rows.shape[0] - 1, matrix.shape[0])
    sparse = torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)
    if matrix.stride(1) != 1:  # MKL is several times slower on a transposed view
        matrix = matrix.contiguous()
    adds = base is not None and base.stride(1) == 1
    for start in range(0, matrix.shape[1], _BLOCK):
        source, target = matrix[:, start : start + _BLOCK], out[:, start : start + _BLOCK]
        if base is None or adds:
            torch.addmm(target, sparse, source, beta=int(adds), out=target)
        else:  # MKL does not write transposed, but a block that is still in the cache is soon turned
            block = target.new_empty(target.shape)
            torch.addmm(block, sparse, source, beta=0, out=block)
            target.T.add_(block.T)
    return out


@torch.library.register_fake("randlora::csr_mm")
def _(rows: Tensor, *inputs: Any) -> Tensor:
    return _start(rows, *inputs[-2:])


def _start(rows: Tensor, matrix: Tensor, base: Tensor | None) -> Tensor:
    """What the product is written or added to."""
    if base is None:
        return _padded(matrix, rows.shape[0] - 1, matrix.shape[1])
    return base.clone() if base.stride(1) == 1 else base.T.clone().T


def _padded(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty matrix, no block of whose columns falls into a few cache lines, as it would at multiples of 64."""
    step = columns + 8 if columns > _BLOCK and columns % 64 == 0 else columns
    return like.new_empty_strided((rows, columns), (max(step, 1), 1))


class _CsrMM(BySample):
    @staticmethod
    def forward(*inputs: Tensor | None) -> Tensor:
        return torch.ops.randlora.csr_mm(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        csr = Csr(*ctx.saved_tensors)
        d_base = grads[0] if ctx.needs_input_grad[7] else None
        return *(None for _ in csr), csr.T.matmul(grads[0]), d_base
