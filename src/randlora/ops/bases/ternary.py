"""Ternary bases, sparse and very sparse ones, and the products that skip their zeros on a CPU.

Numbers are stored as codes of two bits (``codes.py``). Dense products read them as numbers: on a CPU in a copy that
lasts for one call, elsewhere in a copy that is kept, since there launches cost more than memory.

On a CPU, a B with few non-zeros is multiplied as a CSR matrix. A is stored as the columns of each row's non-zeros. Ã
has its non-zeros in the same columns for all bases, so that the products on the side of A are a batch of small dense
products over the rows of A. Tokens are multiplied in blocks, so that a block's activations stay in a core's cache.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from randlora.ops import bf16, codes, plan
from randlora.ops.bases.dense import DenseBases, DenseStored, dense_costs, sliced, unfilled_matrices
from randlora.ops.bases.drawing import chunks, std, words
from randlora.ops.bases.spec import BasisSpec, Forms, on_meta
from randlora.ops.csr import BLOCK, Csr, compress, padded_rows, places_of
from randlora.ops.gpu import availability
from randlora.ops.operands import Beside, Sizes, added, with_base
from randlora.ops.plan import Costs
from randlora.ops.precision import WIDE, at_least_float32
from randlora.ops.rounding import stochastic

_MOST_NONZEROS = 1 / 16  # for denser bases, dense products are as fast as those that skip zeros


@dataclass
class TernaryFields:
    """The fields of an adapter's config for ternary bases that PEFT does not have."""

    sparsity: float | None = field(default=None, metadata={"help": "s of ternary bases, P(±1) = 1/(2s) each"})


@dataclass(frozen=True)
class Ternary:
    """Bases of −1, 0 and 1, divided by their own standard deviation (Li, Hastie & Church 2006).

    Attributes:
        sparsity: s of P(−1) = P(+1) = 1/(2s).
    """

    sparsity: float
    name: ClassVar[str] = "ternary"
    flags: ClassVar[tuple[str, ...]] = ("sparse", "very_sparse")
    values: ClassVar[tuple[str, ...]] = ("sparsity",)
    options: ClassVar[tuple[str, ...]] = ()
    file_type: ClassVar[str | None] = None
    file_itemsize: ClassVar[int] = 4

    @classmethod
    def asked(cls, config: Any, min_dim: int) -> Ternary:
        """Return the kind with s = √m for very sparse bases, s = 3 for sparse ones, or the config's s."""
        if config.very_sparse:
            return cls(math.sqrt(min_dim))
        return cls(3.0 if config.sparse else config.sparsity)

    @classmethod
    def faults(cls, config: Any) -> list[str]:
        """Return a fault for an s below 1 or not finite, for which 1/(2s) is not a probability."""
        s = config.sparsity
        if s is None or 1 <= s <= sys.float_info.max:
            return []
        return [f"sparsity={s!r} must be a finite number of at least 1 (P(±1) = 1/(2·sparsity))"]

    def remark(self, rank: int) -> str:
        """Return an empty string."""
        return ""

    def draw(self, spec: BasisSpec) -> TernaryStored:
        """Return the used part of A (r, 1, m), drawn first, and of B (M, n, r), drawn as one block."""
        r, M, n = spec.rank, spec.max_dim, spec.num_bases
        a_total, b_total = r * spec.min_dim, M * n * r
        drawn = words(spec.key, iter([a_total, *chunks(b_total)]))
        a_codes = _codes(next(drawn), self.sparsity)
        b_codes = np.concatenate([_codes(chunk, self.sparsity) for chunk in drawn])
        used_M, used_n = spec.used_max_dim, spec.used_num_bases
        a = a_codes.reshape(r, spec.min_dim)[:, : spec.used_min_dim]
        b = b_codes.reshape(M, n, r)[:used_M, :used_n].reshape(used_M, used_n * r)
        factors = (_factor(a_codes), _factor(b_codes))
        return TernaryStored(
            torch.from_numpy(np.ascontiguousarray(a)), torch.from_numpy(np.ascontiguousarray(b)), factors, self
        )

    def unfilled(self, spec: BasisSpec) -> DenseStored:
        """Return uninitialised matrices of these sizes, since codes are unpacked for each call."""
        return unfilled_matrices(spec)

    def nbytes(self, spec: BasisSpec) -> int:
        """Return the bytes that the stored form takes: one for each number of A, two bits for each of B."""
        columns = spec.used_num_bases * spec.rank
        return spec.rank * spec.used_min_dim + spec.used_max_dim * codes.bytes_of(columns)

    def costs(self, rank: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, tokens: int) -> Costs:
        """Return the costs of the operands that a layer of these sizes would get."""
        if self.skips_zeros(device, dtype, tokens):
            return _sparse_costs(rank, sizes, tokens, (1 / self.sparsity, 1 / self.sparsity))
        entries = sizes.max_dim * sizes.num_bases * rank
        return dense_costs(rank, sizes, tokens, plan.rates_on(device), bf16.splits(entries, device, dtype))

    def skips_zeros(self, device: torch.device, dtype: torch.dtype, tokens: int | None) -> bool:
        """Return whether products should skip the zeros.

        In half precision only for few tokens: for many, plain products are faster than those in float32.
        """
        if device.type != "cpu" or 1 / self.sparsity > _MOST_NONZEROS or not torch.backends.mkl.is_available():
            return False
        if availability.why_not(device, dtype) is None:
            return False
        return dtype in WIDE or (tokens is not None and tokens <= plan.rates.sparse_tokens)


class TernaryStored:
    """Ternary bases as codes.

    Args:
        a: codes of A (r, m), int8.
        b: codes of B (M, n·r), row-major over (n, r), int8; kept four to a byte.
        factors: factors of the codes of a and b.
        kind: the kind of which they were drawn.
    """

    def __init__(self, a: Tensor, b: Tensor, factors: tuple[float, float], kind: Ternary) -> None:
        self.a, self.packed, self.factors, self.kind = a, codes.pack(b), factors, kind
        self.rank, self.min_dim = a.shape
        self.max_dim, self.num_bases = b.shape[0], b.shape[1] // self.rank
        self.label = "int8"
        self.repays_holding = True
        self.forms = Forms()

    def operands(
        self, device: torch.device, dtype: torch.dtype, sizes: Sizes, tokens: int | None
    ) -> DenseBases | SparseBases:
        """Return a layer's slices.

        On a CPU these are codes, or compressed rows made once for each size of layer; elsewhere numbers, made once for
        a device and dtype.
        """
        if not self.kind.skips_zeros(device, dtype, tokens):
            if device.type == "meta" or not keeps_numbers(device, dtype):
                return self.lookup(device, dtype, sizes)
            A, B = self._numbers_on(device, dtype)
            return DenseBases(A[:, None, : sizes.min_dim], B[: sizes.max_dim, : sizes.num_bases * self.rank], dtype)
        wide = at_least_float32(dtype)

        def make() -> SparseBases:
            a, b = sliced(*self.numbers(), sizes)
            return sparse_bases(a.to(wide), b.to(wide), dtype)

        return self.forms.get((wide, sizes), make)._replace(dtype=dtype)

    def lookup(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> DenseBases:
        """Return a layer's slices as codes."""

        def make() -> tuple[Tensor, Tensor]:
            return self.a.to(device), self.packed.to(device)

        meta = device.type == "meta"
        a, b = (on_meta(self.a, None), on_meta(self.packed, None)) if meta else self.forms.get((device,), make)
        return DenseBases(a[:, None, : sizes.min_dim], b[: sizes.max_dim], dtype)

    def _numbers_on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return all of A and B as numbers, without their factors."""

        def make() -> tuple[Tensor, Tensor]:
            columns = self.num_bases * self.rank
            return self.a.to(device, dtype), codes.unpack(self.packed.to(device), columns, dtype)

        return self.forms.get((device, dtype), make)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Return the codes in int8."""
        return self.a, codes.unpack(self.packed, self.num_bases * self.rank, torch.int8)

    def tensors(self, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> tuple[Tensor, Tensor]:
        """Return A (r, m) and B (M, n·r)."""
        (a, factor_a), (b, factor_b) = zip(sliced(*self.numbers(), sizes), self.factors, strict=True)
        return (a.to(device).float() * factor_a).to(dtype), (b.to(device).float() * factor_b).to(dtype)

    def file_tensors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, m) and B (M, n·r) in float32."""
        return self.tensors(torch.device("cpu"), torch.float32)

    def held(self) -> list[Tensor]:
        """Return the tensors of all forms."""
        held = [self.a, self.packed]
        for form in self.forms:
            held += form.tensors() if isinstance(form, SparseBases) else form
        return held


class SparseBases(NamedTuple):
    """A as the non-zeros of each row, padded with zeros to equal length P, and B as CSR.

    ``v`` are activations on the side of the layer that is m wide, ``u`` those on the side that is M wide. Ã is kept at
    the non-zeros of A only: (r, n, P).

    Attributes:
        columns: (r, P), int64.
        values: (r, P), in the dtype of all computations.
        places: (m, r·P), ones that sum the entries of each column.
        B: (M, q).
        min_dim: m.
        dtype: dtype of the results.
    """

    columns: Tensor
    values: Tensor
    places: Csr
    B: Csr
    min_dim: int
    dtype: torch.dtype

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors, those of the two CSR matrices one by one."""
        return self.columns, self.values, *self.places, *self.B

    def static(self) -> tuple[Any, ...]:
        """Return m and the dtype of the results."""
        return self.min_dim, self.dtype

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], static: tuple[Any, ...]) -> SparseBases:
        """Return the operands of ``tensors()`` and ``static()``."""
        places, B = tensors[2 : 2 + len(Csr._fields)], tensors[2 + len(Csr._fields) :]
        return cls(tensors[0], tensors[1], Csr(*places), Csr(*B), *static)

    @property
    def unit(self) -> float:
        """The factor that the entries of B contain (``units.py``), always 1."""
        return 1.0  # products are in float32 or wider

    def scaled_by(self, scaling: float) -> SparseBases:
        """Return the operands with A's non-zeros multiplied by ``scaling``."""
        return self._replace(values=self.values * scaling)

    def ready(self) -> SparseBases:
        """Return the operands themselves."""
        return self

    def costs(self, tokens: int) -> Costs:
        """Return the costs of products with non-zeros only, and with the padding of A."""
        r, M, q = self.columns.shape[0], self.B.rows.shape[0] - 1, self.B.t_rows.shape[0] - 1
        density = self.columns.shape[1] / max(self.min_dim, 1), self.B.values.shape[0] / max(M * q, 1)
        return _sparse_costs(r, Sizes(M, self.min_dim, q // max(r, 1)), tokens, density)

    def scaled(self, lam: Tensor, gamma: Tensor) -> Tensor:
        """Return Ã at the non-zeros of A, (r, n, P), in the dtype of ``values``."""
        return (lam.unsqueeze(-1) * self.values.unsqueeze(1) * self._at_columns(gamma)).to(self.values.dtype)

    def weight(self, scaled: Tensor, base: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Return B Ã (+ base)."""
        places = self.columns.unsqueeze(1).expand_as(scaled)
        dense = scaled.new_zeros(*scaled.shape[:2], self.min_dim).scatter_add_(2, places, scaled).flatten(0, 1)
        if base is not None and seed is not None:
            return stochastic(self.B.matmul(dense).float() + base.float(), seed)
        return self.B.matmul(dense, base).to(self.dtype)

    def times(self, rows: Tensor, update: Tensor, beside: Beside | None) -> Tensor:
        """Return ``rows @ update`` (+ the base layer's product)."""
        return with_base(rows, update, beside)

    def widen(self, v: Tensor, scaled: Tensor, beside: Beside | None) -> Tensor:
        """Return v Ãᵀ Bᵀ (+ the base layer's product)."""
        inner = ((scaled @ self._selected(block).permute(1, 2, 0)).flatten(0, 1) for block in v.split(BLOCK))  # (q, t)
        return added(_joined([self.B.matmul(block) for block in inner]), beside, self.dtype)

    def project(self, u: Tensor, scaled: Tensor) -> Tensor:
        """Return all of u B Ã, (T, m), by blocks: a block of u B stays in the cache."""
        return _joined([self._collected(self._projected(block), scaled) for block in u.split(BLOCK)])

    def narrow(self, projected: Tensor, scaled: Tensor, beside: Beside | None) -> Tensor:
        """Return u B Ã (+ the base layer's product)."""
        return added(projected, beside, self.dtype)

    def from_tokens(
        self, u: Tensor, v: Tensor, lam: Tensor, gamma: Tensor, scaled: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return u B Ã if ``scaled`` is given, dλ and dγ."""
        total, gathered = self.values.new_zeros(*lam.shape, self.values.shape[1]), []
        for u_block, v_block in zip(u.split(BLOCK), v.split(BLOCK), strict=True):
            projected = self._projected(u_block)
            total = torch.baddbmm(total, projected, self._selected(v_block).transpose(0, 1))
            if scaled is not None:
                gathered.append(self._collected(projected, scaled))
        return _joined(gathered) if gathered else None, *self._gradients(total, lam, gamma)

    def from_weight(self, d_weight: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return dλ and dγ."""
        whole = self.B.T.matmul(d_weight.to(self.values.dtype)).view(self.columns.shape[0], -1, self.min_dim)
        return self._gradients(whole.gather(2, self.columns.unsqueeze(1).expand(-1, whole.shape[1], -1)), lam, gamma)

    def _gradients(self, d_scaled: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return dλ (r, n) and dγ (n, m) from dÃ at the non-zeros of A."""
        weighted = d_scaled * self.values.unsqueeze(1)
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

    def _collected(self, projected: Tensor, scaled: Tensor) -> Tensor:  # (r, n, t) -> (m, t)
        return self.places.matmul((scaled.transpose(1, 2) @ projected).flatten(0, 1))


def _joined(blocks: list[Tensor]) -> Tensor:  # (k, t) each -> (T, k)
    # one by one: torch transposes a whole contiguous matrix several times faster than a part of one
    turned = [block.T.contiguous() for block in blocks]
    return turned[0] if len(turned) == 1 else torch.cat(turned)


def keeps_numbers(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether unpacked codes are kept for products in ``dtype``: not on a CPU, which unpacks them fast."""
    return device.type != "cpu" or availability.why_not(device, dtype) is None


def sparse_bases(A: Tensor, B: Tensor, dtype: torch.dtype) -> SparseBases:
    """Return dense A (r, m) and B (M, q) in the form that is multiplied without their zeros."""
    columns, values = padded_rows(A)
    return SparseBases(columns, values, places_of(columns, values.dtype, A.shape[1]), compress(B), A.shape[1], dtype)


def _sparse_costs(rank: int, sizes: Sizes, tokens: int, density: tuple[float, float]) -> Costs:
    """Return the costs of products with these shares of the entries of A and of B."""
    (M, m, n), rates = sizes, plan.rates
    q, A, B = n * rank, rates.sparse * density[0], rates.sparse * density[1]
    element = rates.element_sparse
    return Costs(
        products="sparse",
        through_A=tokens * q * m * A,
        through_B=tokens * M * (q * B + element),
        weight=q * m * M * B,
        element=element,
        factors=rates.element * q * (m + M),
    )


def _codes(words: np.ndarray, sparsity: float) -> np.ndarray:
    """Return int8 codes: -1 where u < 1/(2s), +1 where u > 1 - 1/(2s), for u = word · 2⁻²⁴, compared in float32."""
    uniform = words.astype(np.float32) * np.float32(2.0**-24)
    edge = 1 / (2 * sparsity)
    return (uniform > np.float32(1 - edge)).astype(np.int8) - (uniform < np.float32(edge)).astype(np.int8)


def _factor(codes: np.ndarray) -> float:
    """Return the factor of codes: the reciprocal, in float32, of their std rounded to float32."""
    plus, minus = int(np.count_nonzero(codes == 1)), int(np.count_nonzero(codes == -1))
    deviation = np.float32(std([-1.0, 0.0, 1.0], [minus, codes.size - plus - minus, plus]))
    return float(np.float32(1) / deviation)
