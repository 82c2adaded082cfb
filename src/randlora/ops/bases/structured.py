"""Structured bases: A in column groups, B a Kronecker product of Hadamard matrices.

Structured bases are this project's extension of the paper (derivation: ``docs/structured.md``). The columns of a layer
of M × m form g groups of c = ⌈m/g⌉ neighbours, A's r rows form g groups of ρ = r/g, and a row is zero outside of its
group's columns. So Ã has ρ·n numbers a column, kept as a matrix (ρ·n, g·c). B = Q_a ⊗ Q_b, with Q_a (g, g) and
Q_b (⌈M/g⌉, ρ·n), both of ±1. With P = Q_b Ã, each block of rows of the update is P with signs, one for each group of
columns: ΔW = [Q_a[a, i] · P_i] for block a and group i.

If g does not divide a size, the last groups (or blocks) have one column (or row) less, and are padded with zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from randlora.ops import plan, rounding
from randlora.ops.bases.drawing import words
from randlora.ops.bases.spec import BasisSpec, Forms
from randlora.ops.gpu import availability
from randlora.ops.operands import Beside, Sizes, added, with_base
from randlora.ops.plan import Costs, Rates
from randlora.ops.precision import WIDE, at_least_float32
from randlora.ops.units import in_units, unit


@dataclass
class StructuredFields:
    """The fields of an adapter's config for structured bases."""

    structured: bool = field(default=False, metadata={"help": "Structured bases, an eighth of the arithmetic"})
    groups: int = field(default=8, metadata={"help": "Groups of structured bases, a power of two"})


@dataclass(frozen=True)
class Structured:
    """Bases with A in groups and B = Q_a ⊗ Q_b of signed Hadamard matrices.

    Attributes:
        groups: largest number of groups, a power of two; bases have the largest power of two up to it that divides r.
    """

    groups: int = 8
    name: ClassVar[str] = "structured"
    flags: ClassVar[tuple[str, ...]] = ("structured",)
    values: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ("groups",)
    file_type: ClassVar[str | None] = "RANDLORA_STRUCTURED"
    file_itemsize: ClassVar[int] = 0

    @classmethod
    def asked(cls, config: Any, min_dim: int) -> Structured:
        """Return the kind with the config's number of groups."""
        return cls(config.groups)

    @classmethod
    def faults(cls, config: Any) -> list[str]:
        """Return a fault for a number of groups that is not a power of two."""
        groups = config.groups
        if groups >= 1 and not groups & (groups - 1):
            return []
        return [f"groups={groups!r} must be a power of two, such as 8 or 16"]

    def remark(self, rank: int) -> str:
        """Return a remark for a rank with fewer groups than asked for, else an empty string."""
        found = self.groups_of(rank)
        if found == self.groups:
            return ""
        return (
            f"of the {self.groups} groups of structured bases r={rank} has {found}, as many as divide it: "
            f"r={max(round(rank / self.groups), 1) * self.groups} has them all, and costs less"
        )

    def groups_of(self, rank: int) -> int:
        """Return the number of groups g of bases of that rank."""
        return math.gcd(rank, self.groups)

    def draw(self, spec: BasisSpec) -> StructuredStored:
        """Return A and the signs of the rows of Q_a and Q_b.

        The signs of Q_a are drawn first, then for each index its column of A and the sign of its row of Q_b. So the
        numbers do not depend on the sizes: layers of any sizes read the same ones.
        """
        g = self.groups_of(spec.rank)
        rho, rows = spec.rank // g, -(-spec.used_max_dim // g)
        drawn = words(spec.key, iter([g, max(spec.used_min_dim, rows) * (rho + 1)]))
        signs, indices = next(drawn), next(drawn).reshape(-1, rho + 1)
        return StructuredStored(
            torch.from_numpy(np.ascontiguousarray(_uniform(indices[: spec.used_min_dim, :rho]).T)),
            torch.from_numpy(_signs(signs)),
            torch.from_numpy(_signs(indices[:rows, rho])),
            spec.used_max_dim,
        )

    def unfilled(self, spec: BasisSpec) -> StructuredStored:
        """Return an uninitialised form of these sizes."""
        g = self.groups_of(spec.rank)
        mix_signs, row_signs = (torch.empty(size, dtype=torch.int8) for size in (g, -(-spec.used_max_dim // g)))
        return StructuredStored(torch.empty(spec.rank // g, spec.used_min_dim), mix_signs, row_signs, spec.used_max_dim)

    def nbytes(self, spec: BasisSpec) -> int:
        """Return the bytes that the stored form takes: A's non-zeros in float32, and signs."""
        g = self.groups_of(spec.rank)
        return 4 * spec.rank // g * spec.used_min_dim + g + -(-spec.used_max_dim // g)

    def costs(self, rank: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, tokens: int) -> Costs:
        """Return the costs of the operands that a layer of these sizes would get."""
        return _costs(rank, self.groups_of(rank), sizes, tokens, plan.rates_on(device))


class StructuredStored:
    """The drawn numbers that define A and B.

    Args:
        a: the non-zeros of A's columns (ρ, m), uniform over (−1, 1), float32.
        mix_signs: signs of Q_a's rows (g,), int8.
        row_signs: signs of Q_b's rows (⌈M/g⌉,), int8.
        max_dim: M, rows of B.
    """

    def __init__(self, a: Tensor, mix_signs: Tensor, row_signs: Tensor, max_dim: int) -> None:
        self.a, self.mix_signs, self.row_signs, self.max_dim = a, mix_signs, row_signs, max_dim
        self.groups = mix_signs.shape[0]
        self.rank, self.min_dim = a.shape[0] * self.groups, a.shape[1]
        self.num_bases = -(-self.min_dim // self.rank)
        self.factors = (math.sqrt(3.0 * self.groups), 1.0)  # for mean squares of 1, with A's zeros counted
        self.label = f"structured {self.groups}"
        self.repays_holding = False  # ΔW needs no product, and few tokens do not need ΔW
        self.forms = Forms()

    def operands(self, device: torch.device, dtype: torch.dtype, sizes: Sizes, tokens: int | None) -> StructuredBases:
        """Return a layer's A, Q_a and Q_b; on a CPU, products in half precision run in float32."""
        in_dtype = device.type != "cpu" or availability.why_not(device, dtype) is None
        held = dtype if in_dtype else at_least_float32(dtype)
        rows, columns = -(-sizes.max_dim // self.groups), sizes.num_bases * self.a.shape[0]

        def make() -> tuple[Tensor, Tensor, Tensor]:
            A = padded(self.a[:, : sizes.min_dim], self.groups, sizes.min_dim)
            mix = self.mix_signs[:, None] * hadamard(self.groups, self.groups).to(self.mix_signs.device)
            B = self.row_signs[:rows, None] * hadamard(rows, columns).to(self.row_signs.device)
            return A.to(device), mix.to(device, held), in_units(B, held).to(device)

        A, mix, B = self.forms.get((device, held, rows, columns, sizes.min_dim), make)
        return StructuredBases(A, mix, B, sizes.max_dim, sizes.min_dim, dtype)

    def lookup(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> StructuredBases:
        """Return the operands, which also give rows of ΔW."""
        return self.operands(device, dtype, sizes, None)

    def tensors(self, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> tuple[Tensor, Tensor]:
        """Return A (r, m) and B (M, n·r) as plain matrices. Those of a smaller layer are not parts of them."""
        sizes = sizes or Sizes(self.max_dim, self.min_dim, self.num_bases)
        operands = self.operands(torch.device("cpu"), torch.float64, sizes, None)
        g, rho = self.groups, self.a.shape[0]
        own = torch.eye(g, dtype=torch.float64).repeat_interleave(operands.A.shape[1] // g, 1)  # (g, g·c)
        A = cut(torch.einsum("gj,kj->gkj", own, operands.A.double()).reshape(g * rho, -1), g, sizes.min_dim)
        B = cut(torch.kron(operands.mix, operands.B).T, g, sizes.max_dim).T
        return (A * self.factors[0]).to(device, dtype), B.to(device, dtype)

    def file_tensors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the largest layer in float64; files do not hold them."""
        return self.tensors(torch.device("cpu"), torch.float64)

    def numbers(self) -> tuple[Tensor, ...]:
        """Return all drawn numbers."""
        return self.a, self.mix_signs, self.row_signs

    def held(self) -> list[Tensor]:
        """Return the tensors of all forms."""
        return [*self.numbers(), *(tensor for form in self.forms for tensor in form)]


class Scaled(NamedTuple):
    """λ (r, n) and γ (n, m), from which Ã is formed on demand."""

    lam: Tensor
    gamma: Tensor


class StructuredBases(NamedTuple):
    """The structured bases of one layer.

    Attributes:
        A: non-zeros of A's columns (ρ, g·c), padded, in float32.
        mix: Q_a (g, g).
        B: Q_b (⌈M/g⌉, ρ·n) in the dtype of the products, and its unit.
        max_dim: M.
        min_dim: m.
        dtype: dtype of the results.
    """

    A: Tensor
    mix: Tensor
    B: Tensor
    max_dim: int
    min_dim: int
    dtype: torch.dtype

    def tensors(self) -> tuple[Tensor, ...]:
        """Return A, Q_a and Q_b."""
        return self[:3]

    def static(self) -> tuple[Any, ...]:
        """Return the sizes and the dtype."""
        return self[3:]

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], static: tuple[Any, ...]) -> StructuredBases:
        """Return the operands of ``tensors()`` and ``static()``."""
        A, mix, B = tensors
        return cls(A, mix, B, *static)

    @property
    def unit(self) -> float:
        """The factor that the entries of Q_b contain (``units.py``)."""
        return unit(self.B.dtype)

    def scaled_by(self, scaling: float) -> StructuredBases:
        """Return the operands with A multiplied by ``scaling`` and divided by Q_b's unit."""
        return self._replace(A=self.A.to(at_least_float32(self.dtype)) * (scaling / self.unit))

    def ready(self) -> StructuredBases:
        """Return the operands themselves."""
        return self

    def costs(self, tokens: int) -> Costs:
        """Return the costs of products by groups."""
        rho, g = self.A.shape[0], self.groups
        sizes = Sizes(self.max_dim, self.min_dim, self.B.shape[1] // rho)
        return _costs(rho * g, g, sizes, tokens, plan.rates_on(self.B.device))

    @property
    def groups(self) -> int:
        """Number of groups g."""
        return self.mix.shape[0]

    def scaled(self, lam: Tensor, gamma: Tensor) -> Scaled:
        """Return λ and γ, since few tokens are multiplied by them in turn, without forming Ã."""
        return Scaled(lam, gamma)

    def weight(self, scaled: Scaled, base: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Return B Ã (+ base), in one elementwise pass."""
        formed = self._formed(scaled)
        if base is not None and base.stride(1) != 1:  # in the base's memory order
            update = (formed.T @ self.B.T).unsqueeze(1), self._signs().T.unsqueeze(2)  # (g·c, g, ⌈M/g⌉)
            return self._sum(update, 1, base.T, seed).T
        update = (self.B @ formed).unsqueeze(0), self._signs().unsqueeze(1)  # (g, ⌈M/g⌉, g·c)
        return self._sum(update, 0, base, seed)

    def times(self, rows: Tensor, update: Tensor, beside: Beside | None) -> Tensor:
        """Return ``rows @ update`` (+ the base layer's product)."""
        return with_base(rows, update, beside)

    def widen(self, v: Tensor, scaled: Scaled, beside: Beside | None) -> Tensor:
        """Return v Ãᵀ Bᵀ (+ the base layer's product)."""
        tokens = v.shape[0]
        if self._one_by_one(tokens):
            blocks = self._through(v, scaled)  # (T·g, ρ·n)
        else:
            inner = self._columns(v) @ self._factor(tokens, scaled).permute(1, 2, 0)  # (g, T, k)
            mixed = self._mixed(inner.transpose(0, 1), self.mix)  # (T, g, k)
            if not self._by_token(tokens):
                return self._plus(mixed.flatten(1), beside, self.max_dim)
            blocks = mixed.flatten(0, 1)
        if beside is None or beside.rows.dtype not in WIDE or self.max_dim % self.groups:
            found = (blocks @ self.B.T).reshape(tokens, self.groups * self.B.shape[0])
            return self._plus(found, beside, self.max_dim)
        base = beside.product()
        return torch.addmm(base.view(blocks.shape[0], self.B.shape[0]), blocks, self.B.T).view_as(base)

    def project(self, u: Tensor, scaled: Scaled | None = None) -> Tensor:
        """Return u (Q_a ⊗ Q_b) as (T, g, ρ·n), or, for more tokens than Q_b has rows, u (Q_a ⊗ 1)."""
        mixed = self._mixed(self._blocks(u, self.max_dim), self.mix.T)  # (T, g, ⌈M/g⌉)
        return mixed @ self.B if self._by_token(u.shape[0]) else mixed

    def narrow(self, projected: Tensor, scaled: Scaled, beside: Beside | None) -> Tensor:
        """Return u B Ã (+ the base layer's product)."""
        tokens = projected.size(0)  # torch 2.11 cannot trace a shape of three dimensions, one of which is a symbol
        if self._one_by_one(tokens):
            inner = self._back(projected, scaled)  # (g, T, c)
        else:
            inner = projected.transpose(0, 1) @ self._factor(tokens, scaled).transpose(0, 1)
        return self._plus(inner.transpose(0, 1).flatten(1), beside, self.min_dim)

    def from_tokens(
        self, u: Tensor, v: Tensor, lam: Tensor, gamma: Tensor, scaled: Scaled | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``project(u)``, dλ and dγ."""
        projected = self.project(u)
        gradient = projected.permute(1, 2, 0) @ self._columns(v)  # (g, k, c)
        if not self._by_token(u.shape[0]):
            gradient = self.B.T @ gradient
        return projected, *self._gradients(gradient, lam, gamma)

    def from_weight(self, d_weight: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return dλ and dγ."""
        blocks = self._blocks(self._blocks(d_weight, self.min_dim).flatten(1).T, self.max_dim)  # (g·c, a, t)
        by_group = blocks.unflatten(0, (self.groups, -1))
        return self._gradients(self.B.T @ torch.einsum("ijat,ai->itj", by_group, self.mix), lam, gamma)

    def rows(self, ids: Tensor, scaled: Scaled, wide: bool) -> Tensor:
        """Return rows ``ids`` of B Ã, or of its transpose."""
        signs, formed = self._signs(), self._formed(scaled)
        ids = self._padded_ids(ids, self.max_dim if wide else self.min_dim)
        if wide:
            block = self.B.shape[0]
            found = (F.embedding(ids % block, self.B) @ formed) * F.embedding(ids // block, signs)
            return cut(found, self.groups, self.min_dim).to(self.dtype)
        inner = F.embedding(ids, formed.T) @ self.B.T  # (*ids, ⌈M/g⌉)
        found = (F.embedding(ids, signs.T).unsqueeze(-1) * inner.unsqueeze(-2)).flatten(-2)
        return cut(found, self.groups, self.max_dim).to(self.dtype)

    def table(self, scaled: Scaled, wide: bool) -> Tensor:
        """Return B Ã, or its transpose."""
        return self.weight(scaled) if wide else self.weight(scaled).T

    def _one_by_one(self, tokens: int) -> bool:
        """Return whether γ, A and λ multiply tokens in turn, which saves forming ρ·n numbers of Ã for each column."""
        return tokens <= self.A.shape[0] and self._by_token(tokens) and self.B.dtype in WIDE

    def _formed(self, scaled: Scaled) -> Tensor:
        """Return Ã (ρ·n, g·c) without the zeros outside of its groups, formed in float32 or wider, rounded once."""
        kernels = availability.kernels(self.B.dtype, self.A, *scaled)
        if kernels is not None:
            return kernels.scaled(self.A, scaled.lam, self._padded(scaled.gamma), self.B.dtype, self.groups)
        lam, gamma = self._by_group(*scaled)
        lam, gamma = lam.permute(1, 2, 0).unsqueeze(-1), gamma.transpose(0, 1)  # (ρ, n, g, 1), (n, g, c)
        formed = (lam * gamma * self._grouped_A(lam.dtype).unsqueeze(1)).flatten(0, 1).flatten(1)
        return formed if formed.dtype == self.B.dtype else formed.to(self.B.dtype)

    def _factor(self, tokens: int, scaled: Scaled) -> Tensor:
        """Return Ã, or for many tokens P = Q_b Ã, (k, g, c)."""
        formed = self._formed(scaled)
        return (formed if self._by_token(tokens) else self.B @ formed).unflatten(1, (self.groups, -1))

    def _through(self, v: Tensor, scaled: Scaled) -> Tensor:  # (T, m) -> (T·g, ρ·n), mixed
        # few steps, and no copy for one token: here each step takes as long as a product
        # sizes are explicit, since torch cannot infer one for zero tokens
        (r, n), tokens, g = scaled.lam.shape, v.shape[0], self.groups
        v, gamma = self._padded(v.to(self.B.dtype)), self._padded(scaled.gamma)
        inner = (v.unsqueeze(1) * gamma).reshape(tokens * n, g, gamma.shape[1] // g).permute(1, 2, 0)  # (g, c, T·n)
        inner = self._grouped_A(inner.dtype).transpose(0, 1) @ inner  # (g, ρ, T·n)
        inner = inner.reshape(r, tokens, n) * scaled.lam.unsqueeze(1)
        mixed = self.mix @ inner.reshape(g, r // g * tokens * n)
        return mixed.reshape(g, r // g, tokens, n).permute(2, 0, 1, 3).reshape(tokens * g, r // g * n)

    def _back(self, projected: Tensor, scaled: Scaled) -> Tensor:  # (T, g, ρ·n) -> (g, T, c)
        (r, n), tokens, g = scaled.lam.shape, projected.shape[0], self.groups
        gamma = self._padded(scaled.gamma).reshape(n, g, -1).transpose(0, 1)  # (g, n, c)
        inner = (projected.reshape(tokens, r, n) * scaled.lam).reshape(tokens, g, r // g, n)
        inner = inner.permute(1, 0, 3, 2).reshape(g, tokens * n, r // g)  # (g, T·n, ρ)
        inner = (inner @ self._grouped_A(inner.dtype).transpose(0, 1)).reshape(g, tokens, n, gamma.shape[2])
        return (inner * gamma.unsqueeze(1)).sum(2)

    def _mixed(self, values: Tensor, mix: Tensor) -> Tensor:
        """Return ``mix @ values`` for values (T, g, k)."""
        kernels = availability.kernels(self.B.dtype, values, mix)
        if kernels is not None:
            return kernels.mixed(values, mix)
        return (mix @ values[0]).unsqueeze(0) if values.size(0) == 1 else mix @ values

    def _grouped_A(self, dtype: torch.dtype) -> Tensor:  # (ρ, g·c) -> (ρ, g, c)
        A = self.A if self.A.dtype == dtype else self.A.to(torch.promote_types(dtype, self.A.dtype))
        return A.reshape(A.shape[0], self.groups, -1)  # faster than `unflatten`

    def _by_token(self, tokens: int) -> bool:
        """Return whether Q_b multiplies the tokens, rather than Ã once for all of them."""
        return tokens <= self.B.shape[0]

    def _padded(self, values: Tensor) -> Tensor:  # (..., m) -> (..., g·c)
        return padded(values, self.groups, self.min_dim)

    def _blocks(self, values: Tensor, size: int) -> Tensor:  # (T, size) -> (T, g, ⌈size/g⌉)
        values = padded(values.to(self.B.dtype), self.groups, size)
        return values.reshape(-1, self.groups, -(-size // self.groups))

    def _columns(self, v: Tensor) -> Tensor:  # (T, m) -> (g, T, c)
        return self._blocks(v, self.min_dim).transpose(0, 1)

    def _padded_ids(self, ids: Tensor, size: int) -> Tensor:
        """Return the positions, among padded groups, of indices below ``size``."""
        length, edge, short = _layout(size, self.groups)
        if not short:
            return ids
        return torch.where(ids < edge, ids, ids + (ids - edge) // max(length - 1, 1))

    def _plus(self, update: Tensor, beside: Beside | None, size: int) -> Tensor:
        """Return the update without its padding, plus the base layer's product, rounded once."""
        return added(cut(update, self.groups, size), beside, self.dtype)

    def _by_group(self, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return λ (r, n) as (g, ρ, n), and γ (n, m) as (g, n, c)."""
        gamma = self._padded(gamma).unflatten(1, (self.groups, -1)).transpose(0, 1)
        return lam.unflatten(0, (self.groups, -1)), gamma

    def _signs(self) -> Tensor:
        """Return Q_a[a, i] for each block of rows a and each column, (g, g·c)."""
        return self.mix.repeat_interleave(self.A.shape[1] // self.groups, 1)

    def _sum(self, update: tuple[Tensor, Tensor], blocks: int, base: Tensor | None, seed: Tensor | None) -> Tensor:
        """Return ``base`` plus the update, given as P and signs; dimension ``blocks`` and the next are M's."""
        even = not (self.max_dim % self.groups or self.min_dim % self.groups)
        if base is not None and seed is None and even and base.dtype == self.B.dtype == self.dtype:
            return torch.addcmul(base.unflatten(blocks, (self.groups, -1)), *update).flatten(blocks, blocks + 1)
        product = (update[0] * update[1]).flatten(blocks, blocks + 1)
        rows, columns = (self.min_dim, self.max_dim) if blocks else (self.max_dim, self.min_dim)
        product = cut(cut(product, self.groups, columns).T, self.groups, rows).T
        if base is not None and seed is not None:
            return rounding.stochastic_sum(product, base, seed)
        return (product if base is None else product + base).to(self.dtype)

    def _gradients(self, d_scaled: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return dλ (r, n) and dγ (n, m) from dÃ (g, ρ·n, c)."""
        kernels = availability.kernels(self.B.dtype, d_scaled, self.A, lam, gamma)
        if kernels is not None:
            d_lam, d_gamma = kernels.scaling_gradients(d_scaled, self.A, lam, self._padded(gamma))
            return d_lam, cut(d_gamma, self.groups, self.min_dim)
        rho = self.A.shape[0]
        wide = at_least_float32(d_scaled.dtype)
        d = d_scaled.to(wide).unflatten(1, (rho, -1))  # (g, ρ, n, c)
        A = self._grouped_A(wide).transpose(0, 1).unsqueeze(2)  # (g, ρ, 1, c)
        weighted = d * A
        lam, gamma = self._by_group(lam.to(wide), gamma.to(wide))
        d_lam = (weighted * gamma.unsqueeze(1)).sum(-1).flatten(0, 1)
        d_gamma = (weighted * lam.unsqueeze(-1)).sum(1)  # (g, n, c)
        return d_lam, cut(d_gamma.transpose(0, 1).flatten(1), self.groups, self.min_dim)


def _layout(size: int, groups: int) -> tuple[int, int, int]:
    """Return the length of most groups, the index of the first shorter group, and the number of shorter groups."""
    length, short = -(-size // groups), -size % groups
    return length, (groups - short) * length, short


def padded(values: Tensor, groups: int, size: int) -> Tensor:
    """Return values (..., size) with a zero after each of the last groups, which are shorter.

    The size is given, since torch 2.11 cannot trace sizes of tensors that are symbols first and constants later.
    """
    length, edge, short = _layout(size, groups)
    if not short:
        return values
    whole, rest = values.split([edge, short * (length - 1)], -1)
    return torch.cat([whole, F.pad(rest.unflatten(-1, (short, length - 1)), (0, 1)).flatten(-2)], -1)


def cut(values: Tensor, groups: int, size: int) -> Tensor:
    """Return the ``size`` values from which ``padded`` made ``values``."""
    length, edge, short = _layout(size, groups)
    if not short:
        return values
    whole, rest = values.split([edge, short * length], -1)
    return torch.cat([whole, rest.unflatten(-1, (short, length))[..., :-1].flatten(-2)], -1)


def hadamard(rows: int, columns: int) -> Tensor:
    """Return the first rows and columns of Sylvester's Hadamard matrices, ±1 in int8; each matrix begins the next.

    The matrices are Kronecker powers of an L D U with unit triangular factors and no zero in D, hence of that form too.
    So the returned part has full rank for any sizes.
    """
    found = np.ones((1, 1), np.int8)
    while found.shape[0] < rows or found.shape[1] < columns:
        found = np.block([[found, found], [found, -found]])[:rows, :columns]
    return torch.from_numpy(found[:rows, :columns].copy())


def _costs(rank: int, groups: int, sizes: Sizes, tokens: int, rates: Rates) -> Costs:
    """Return the costs of products by groups; Q_b multiplies the tokens or, for many tokens, Ã."""
    M, m, n = sizes
    rows, q, element = -(-M // groups), n * rank, rates.element_structured
    form = rows * q * m / groups  # P = Q_b Ã
    by_token = tokens <= rows
    return Costs(
        products="structured",
        through_A=tokens * q * m / groups if by_token else tokens * M * m / groups + form,
        through_B=tokens * (M + q) * element / 2 + (tokens * q * M / groups if by_token else 0.0),
        weight=form,
        element=element,
        factors=element * q * m / groups,
    )


def _uniform(drawn: np.ndarray) -> np.ndarray:
    """Return the middles of 2²⁴ intervals between −1 and 1, exact in float32 and never zero."""
    return ((2 * drawn.astype(np.int64) + 1 - 2**24) / 2**24).astype(np.float32)


def _signs(drawn: np.ndarray) -> np.ndarray:
    """Return ±1 in int8, from the highest of 24 bits."""
    return (1 - 2 * (drawn >> np.uint32(23)).astype(np.int8)).astype(np.int8)
