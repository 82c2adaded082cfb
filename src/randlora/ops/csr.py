"""Sparse matrices in compressed rows, and their product with a dense one, on CPU."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.ops.bf16 import BySample, call

BLOCK = 256  # tokens, or columns of a dense matrix

with warnings.catch_warnings():  # torch warns once that its CSR tensors are in beta
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
        """Return ``self @ matrix (+ base)``."""
        return call(_CsrMM, torch.ops.randlora.csr_mm, *self, matrix, base)


def compress(matrix: Tensor) -> Csr:
    """Return the CSR form of a dense matrix and of its transpose."""
    return Csr(*_compressed(matrix), *_compressed(matrix.T))


def padded_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns (r, P) and values (r, P) of each row's non-zeros; P ≥ 1 is the largest number of them in a row."""
    present = matrix != 0
    width = max(int(present.sum(1).max()), 1) if matrix.numel() else 1
    # the columns of non-zeros first, in their order
    columns = torch.argsort((~present).to(torch.uint8), dim=1, stable=True)[:, :width].contiguous()
    return columns, matrix.gather(1, columns)


def places_of(columns: Tensor, dtype: torch.dtype, min_dim: int) -> Csr:
    """Return the matrix (m, r·P) with a one at (columns[j], j) for each j."""
    flat = columns.flatten()
    offsets = torch.cat([flat.new_zeros(1), torch.bincount(flat, minlength=min_dim).cumsum(0)])
    order, every = torch.argsort(flat, stable=True), torch.arange(flat.numel() + 1, device=flat.device)
    ones = torch.ones(flat.numel(), dtype=dtype, device=flat.device)  # cloned: Dynamo takes no tensor twice
    return Csr(offsets.int(), order.int(), ones, every.int(), flat.int(), ones.clone())


def _compressed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = matrix.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=matrix.shape[0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return offsets.int(), columns.int(), matrix[rows, columns]


# The gradient needs the transpose.
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
    for start in range(0, matrix.shape[1], BLOCK):
        source, target = matrix[:, start : start + BLOCK], out[:, start : start + BLOCK]
        if base is None or adds:
            torch.addmm(target, sparse, source, beta=int(adds), out=target)
        else:  # MKL does not write transposed, but transposing a block in the cache is fast
            block = target.new_empty(target.shape)
            torch.addmm(block, sparse, source, beta=0, out=block)
            target.T.add_(block.T)
    return out


@torch.library.register_fake("randlora::csr_mm")
def _(rows: Tensor, *inputs: Any) -> Tensor:
    return _start(rows, *inputs[-2:])


def _start(rows: Tensor, matrix: Tensor, base: Tensor | None) -> Tensor:
    """Return the matrix to which the product is written or added."""
    if base is None:
        return _padded(matrix, rows.shape[0] - 1, matrix.shape[1])
    return base.clone() if base.stride(1) == 1 else base.T.clone().T


def _padded(like: Tensor, rows: int, columns: int) -> Tensor:
    """Return an empty matrix whose rows are padded at multiples of 64, where a column would use few cache lines."""
    step = columns + 8 if columns > BLOCK and columns % 64 == 0 else columns
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
