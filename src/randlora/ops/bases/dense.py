"""Dense bases, PEFT's default, and their products as matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from randlora.ops import bf16, codes, plan, rounding
from randlora.ops.bases.drawing import round_to_bfloat16, std, words
from randlora.ops.bases.spec import BasisSpec, Forms, on_meta
from randlora.ops.gpu import availability
from randlora.ops.operands import Beside, Sizes, product, with_base
from randlora.ops.plan import Costs, Rates
from randlora.ops.precision import at_least_float32
from randlora.ops.units import in_units, unit

_IN_CACHE = 1 << 17  # most numbers of a temporary that stays in a core's cache


@dataclass(frozen=True)
class Dense:
    """Kaiming-uniform numbers in bfloat16, divided by their own standard deviation, as PEFT draws them."""

    name: ClassVar[str] = "dense"
    flags: ClassVar[tuple[str, ...]] = ()
    values: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    file_type: ClassVar[str | None] = None
    file_itemsize: ClassVar[int] = 2

    @classmethod
    def asked(cls, config: Any, min_dim: int) -> Dense:
        """Return the kind, which has no options."""
        return cls()

    @classmethod
    def faults(cls, config: Any) -> list[str]:
        """Return an empty list: a config has no fields for dense bases."""
        return []

    def remark(self, rank: int) -> str:
        """Return an empty string."""
        return ""

    def draw(self, spec: BasisSpec) -> DenseStored:
        """Return the used part of A, drawn first, and of B, drawn as one block (M, 1, r) for each base."""
        r, M, n = spec.rank, spec.max_dim, spec.num_bases
        used_M, used_n = spec.used_max_dim, spec.used_num_bases
        drawn = words(spec.key, iter([r * spec.min_dim] + [M * r] * n))

        a_bits = _kaiming_bits(next(drawn), fan_in=spec.min_dim)
        a_counts = np.bincount(a_bits, minlength=1 << 16)
        b_counts = np.zeros(1 << 16, np.int64)
        b_bits = np.empty((used_M, used_n, r), np.uint16)
        for base, block in enumerate(drawn):
            bits = _kaiming_bits(block, fan_in=r)
            b_counts += np.bincount(bits, minlength=1 << 16)
            if base < used_n:
                b_bits[:, base] = bits.reshape(M, r)[:used_M]

        a = _divide_by_std(a_bits.reshape(r, spec.min_dim)[:, : spec.used_min_dim], a_counts)
        b = _divide_by_std(b_bits.reshape(used_M, used_n * r), b_counts)
        return DenseStored(a, b)

    def unfilled(self, spec: BasisSpec) -> DenseStored:
        """Return uninitialised matrices of these sizes."""
        return unfilled_matrices(spec)

    def nbytes(self, spec: BasisSpec) -> int:
        """Return the bytes that the stored form takes: two for each number."""
        return 2 * spec.entries

    def costs(self, rank: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, tokens: int) -> Costs:
        """Return the costs of the operands that a layer of these sizes would get."""
        entries = sizes.max_dim * sizes.num_bases * rank
        return dense_costs(rank, sizes, tokens, plan.rates_on(device), bf16.splits(entries, device, dtype))


class DenseStored:
    """Floating point bases: in bfloat16 where drawn, in any dtype where read from a file.

    Args:
        a: A (r, m).
        b: B (M, n·r), row-major over (n, r), of the same dtype.
    """

    factors = (1.0, 1.0)

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.rank, self.min_dim = a.shape
        self.max_dim, self.num_bases = b.shape[0], b.shape[1] // self.rank
        self.label = str(a.dtype).removeprefix("torch.")
        self.repays_holding = True
        self.forms = Forms()

    def operands(self, device: torch.device, dtype: torch.dtype, sizes: Sizes, tokens: int | None) -> DenseBases:
        """Return a layer's slices, cast once for a device and dtype, or uncast bfloat16 if products can read it."""
        columns = sizes.num_bases * self.rank
        if self.b.dtype == torch.bfloat16 and bf16.splits(self.b.numel(), device, dtype):
            return self.lookup(device, dtype, sizes)
        A, B = self._on(device, dtype)
        return DenseBases(A[:, None, : sizes.min_dim], B[: sizes.max_dim, :columns], dtype)

    def lookup(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> DenseBases:
        """Return a layer's slices in their stored dtype."""
        A, B = self._on(device, None)
        return DenseBases(A[:, None, : sizes.min_dim], B[: sizes.max_dim, : sizes.num_bases * self.rank], dtype)

    def tensors(self, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> tuple[Tensor, Tensor]:
        """Return copies of A (r, m) and B (M, n·r)."""
        a, b = sliced(self.a, self.b, sizes)
        return a.to(device, dtype, copy=True), b.to(device, dtype, copy=True)

    def file_tensors(self) -> tuple[Tensor, Tensor]:
        """Return copies of A (r, m) and B (M, n·r) in the dtype in which they are stored."""
        return self.tensors(torch.device("cpu"), self.a.dtype)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Return A and B without the factors."""
        return self.a, self.b

    def held(self) -> list[Tensor]:
        """Return the tensors of all forms."""
        return [self.a, self.b, *(tensor for form in self.forms for tensor in form)]

    def _on(self, device: torch.device, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Return all of A and B, cast to ``dtype``, or in their stored dtype for ``None``."""
        if device.type == "meta":
            return on_meta(self.a, dtype), on_meta(self.b, dtype)

        def make() -> tuple[Tensor, Tensor]:
            a, b = self.a.to(device), self.b.to(device)
            return (a, b) if dtype is None else (a.to(dtype), in_units(b, dtype))

        return self.forms.get((device, dtype), make)


class DenseBases(NamedTuple):
    """Bases as matrices.

    B is in the dtype of the products; or in bfloat16 for products in float32, which are exact (``bf16.py``); or in
    ternary codes, which ``ready`` unpacks. For products in float16, B is multiplied by its unit (``units.py``). BLAS
    computes the products on every device; on a GPU, kernels compute the steps between them (``gpu/``).

    Attributes:
        A: (r, 1, m); codes are int8.
        B: (M, q), over (n, r); codes are four to a byte (``codes.py``).
        dtype: dtype of the products.
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
    def of(cls, tensors: tuple[Tensor, ...], static: tuple[Any, ...]) -> DenseBases:
        """Return the operands of ``tensors()`` and ``static()``."""
        A, B = tensors
        return cls(A, B, *static)

    @property
    def unit(self) -> float:
        """The factor that the entries of B contain (``units.py``)."""
        return unit(self.dtype)

    def scaled_by(self, scaling: float) -> DenseBases:
        """Return the operands with A multiplied by ``scaling`` and divided by B's unit."""
        return self._replace(A=self.A.to(at_least_float32(self.dtype)) * (scaling / self.unit))

    def ready(self) -> DenseBases:
        """Return the operands with B unpacked."""
        if self.B.dtype == self.dtype or (self.B.is_floating_point() and self._splits):
            return self
        return self._replace(B=self._numbers(self.B, torch.bfloat16 if self._splits else self.dtype))

    def costs(self, tokens: int) -> Costs:
        """Return the costs of products with matrices."""
        sizes = Sizes(self.B.shape[0], self.A.shape[2], self._columns // max(self.A.shape[0], 1))
        return dense_costs(self.A.shape[0], sizes, tokens, plan.rates_on(self.B.device), self._splits)

    def scaled(self, lam: Tensor, gamma: Tensor) -> Tensor:
        """Return Ã (q, m), rows over (r, n), formed in the wider of the dtypes."""
        kernels = availability.kernels(self.dtype, self.A, lam, gamma)
        if kernels is not None:
            return kernels.scaled(self.A, lam, gamma, self.dtype)
        A = self.A
        if not A.dtype == lam.dtype == self.dtype:
            A = A.to(torch.promote_types(lam.dtype, self.dtype))
        scaled = torch.mul(lam.unsqueeze(-1), A)
        # allocating memory of this size can cost more than writing to it
        scaled = (scaled * gamma if bf16.is_watched() else scaled.mul_(gamma)).flatten(0, 1)
        return scaled if scaled.dtype == self.dtype else scaled.to(self.dtype)

    def weight(self, scaled: Tensor, base: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Return B Ã (+ base)."""
        if base is not None and base.stride(1) != 1:
            return _sum(scaled.T, self.B.T, base.T, seed).T
        return _sum(self.B, scaled, base, seed)

    def times(self, rows: Tensor, update: Tensor, beside: Beside | None) -> Tensor:
        """Return ``rows @ update`` (+ the base layer's product)."""
        return with_base(rows, update, beside)

    def widen(self, v: Tensor, scaled: Tensor, beside: Beside | None) -> Tensor:
        """Return v Ãᵀ Bᵀ (+ the base layer's product)."""
        return with_base(F.linear(v, scaled), self.B.T, beside)

    def project(self, u: Tensor, scaled: Tensor | None = None) -> Tensor:
        """Return u B, (T, q)."""
        return product(u, self.B)

    def narrow(self, projected: Tensor, scaled: Tensor, beside: Beside | None) -> Tensor:
        """Return u B Ã (+ the base layer's product)."""
        return with_base(projected, scaled, beside)

    def from_tokens(
        self, u: Tensor, v: Tensor, lam: Tensor, gamma: Tensor, scaled: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return u B, dλ and dγ."""
        projected = self.project(u)
        return projected, *self._gradients(projected.T @ v, lam, gamma)

    def from_weight(self, d_weight: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return dλ and dγ."""
        return self._gradients(product(self.B.T, d_weight), lam, gamma)

    def rows(self, ids: Tensor, scaled: Tensor, wide: bool) -> Tensor:
        """Return rows ``ids`` of B Ã, or of its transpose."""
        if wide:
            return self._numbers(F.embedding(ids, self.B), self.dtype) @ scaled
        return F.embedding(ids, scaled.T) @ self._numbers(self.B, self.dtype).T

    def table(self, scaled: Tensor, wide: bool) -> Tensor:
        """Return B Ã, or its transpose."""
        B = self._numbers(self.B, self.dtype)
        return B @ scaled if wide else scaled.T @ B.T

    @property
    def _columns(self) -> int:
        """q = n·r with n = ceil(m / r)."""
        rank, _, min_dim = self.A.shape
        return -(-min_dim // rank) * rank

    @property
    def _splits(self) -> bool:
        """Whether exact products in float32 read B as bfloat16."""
        if self.B.is_floating_point():
            return self.B.dtype == torch.bfloat16 and self.dtype == torch.float32
        return bf16.splits(self.B.shape[0] * self._columns, self.B.device, self.dtype)

    def _numbers(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of B as numbers, in ``dtype`` and its unit."""
        if stored.is_floating_point():
            return in_units(stored, dtype)
        return codes.unpack(stored, self._columns, dtype)

    def _gradients(self, d_scaled: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return dλ (r, n) and dγ (n, m) from dÃ, which is read once, summed in the wider of the dtypes."""
        kernels = availability.kernels(self.dtype, d_scaled, self.A, lam, gamma)
        if kernels is not None:
            return kernels.scaling_gradients(d_scaled.unsqueeze(0), self.A, lam, gamma)
        if lam.dtype == gamma.dtype == d_scaled.dtype == self.A.dtype and d_scaled.numel() <= _IN_CACHE:
            weighted = d_scaled.view(*lam.shape, -1) * self.A  # (r, n, m)
            return (weighted * gamma).sum(-1), (weighted * lam.unsqueeze(-1)).sum(0)
        dtype = torch.promote_types(lam.dtype, d_scaled.dtype)
        lam, gamma = lam.to(dtype), gamma.to(dtype)
        # in one block on a GPU, which has no such cache
        step = max(_IN_CACHE // max(gamma.numel(), 1), 1) if d_scaled.device.type == "cpu" else max(lam.shape[0], 1)
        d_lam, d_gamma = [], torch.zeros_like(gamma)
        blocks = (t.split(step) for t in (d_scaled.view(*lam.shape, -1), self.A.to(dtype), lam))
        for gradient, A, scale in zip(*blocks, strict=True):
            weighted = gradient.to(dtype) * A  # (rows, n, m)
            d_lam.append((weighted * gamma).sum(-1))
            d_gamma = d_gamma + (weighted * scale.unsqueeze(-1)).sum(0)
        return torch.cat(d_lam), d_gamma


def unfilled_matrices(spec: BasisSpec) -> DenseStored:
    """Return uninitialised bfloat16 matrices in place of A and B."""
    return DenseStored(
        torch.empty(spec.rank, spec.used_min_dim, dtype=torch.bfloat16),
        torch.empty(spec.used_max_dim, spec.used_num_bases * spec.rank, dtype=torch.bfloat16),
    )


def sliced(a: Tensor, b: Tensor, sizes: Sizes | None) -> tuple[Tensor, Tensor]:
    """Return the parts of A (r, m) and B (M, n·r) that a layer of these sizes reads."""
    return (a, b) if sizes is None else (a[:, : sizes.min_dim], b[: sizes.max_dim, : sizes.num_bases * a.shape[0]])


def _sum(a: Tensor, b: Tensor, base: Tensor | None, seed: Tensor | None) -> Tensor:
    """Return ``a @ b (+ base)``; with a seed, rounded stochastically."""
    if base is None or seed is None:
        return product(a, b, base)
    return rounding.stochastic_sum(product(a, b), base, seed)


def dense_costs(rank: int, sizes: Sizes, tokens: int, rates: Rates, splits: bool) -> Costs:
    """Return the costs of products with matrices; ``splits`` says that B is read as bfloat16 by exact products."""
    M, m, n = sizes
    q, rate, element = n * rank, rates.split if splits else 1.0, rates.element
    return Costs(
        products="split" if splits else "plain",
        through_A=tokens * q * m,
        through_B=tokens * q * M * rate,
        weight=q * m * M * rate,
        element=element,
        factors=element * q * (m + M),
    )


def _kaiming_bits(words: np.ndarray, fan_in: int) -> np.ndarray:
    """Return bit patterns (uint16) of bfloat16 values, uniform over [-β, β) with β of ``kaiming_uniform_(a=√5)``."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan_in))
    low = np.float32(-bound)
    span = np.float32(np.float32(bound) - low)
    # 24-bit word times 24-bit span, plus low: exact in float64, so that it is rounded once, as in an fma
    values = words.astype(np.float64)
    values *= float(span) * 2.0**-24
    values += float(low)
    bits = round_to_bfloat16(values.astype(np.float32))
    upper, lower = round_to_bfloat16(np.array([bound, -bound], np.float32))
    bits[bits == upper] = lower  # the upper bound is excluded, as in torch
    return bits


def _divide_by_std(bits: np.ndarray, counts: np.ndarray) -> torch.Tensor:
    """Return bfloat16 quotients of the values and their std; its histogram makes the order of summation irrelevant."""
    patterns = np.arange(1 << 16, dtype=np.uint32)
    values = (patterns << np.uint32(16)).view(np.float32)
    present = np.nonzero(counts)[0]
    deviation = std(values[present].astype(np.float64).tolist(), counts[present].tolist())
    rounded = round_to_bfloat16(np.array([deviation], np.float32)).astype(np.uint32)
    std_bf16 = (rounded << np.uint32(16)).view(np.float32)[0]
    table = np.zeros(1 << 16, np.uint16)
    table[present] = round_to_bfloat16(values[present] / std_bf16)
    return torch.from_numpy(table[bits].view(np.int16)).view(torch.bfloat16)
