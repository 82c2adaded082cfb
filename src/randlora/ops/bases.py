"""Which numbers the frozen bases A and B are, and how they are kept.

The numbers are defined here, without torch's generator, so that they are the same on every machine, thread count
and version: MT19937 words, exact arithmetic, a standard deviation that is summed from a histogram. They agree bit
for bit with what PEFT draws on a machine that supports bfloat16. ``docs/bases.md`` states the definition in words.
"""

from __future__ import annotations

import hashlib
import math
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from randlora.errors import BasisMismatchError
from randlora.ops import bf16, codes, dispatch
from randlora.ops.grouped import GroupedBases, grouped
from randlora.ops.operands import DenseBases
from randlora.ops.sparse import SparseBases, sparse_bases
from randlora.ops.units import in_units

_WORDS_PER_CHUNK = 1 << 22  # bounds the scratch memory of a draw to about 100 MB
_SHORT_DTYPES = (torch.bfloat16, torch.float16)
_MOST_NONZEROS = 1 / 16  # denser than that, dense products are as fast as those that skip zeros


@dataclass(frozen=True)
class BasisSpec:
    """Everything that the numbers of a pair of bases depend on.

    ``min_dim`` and ``max_dim`` are the sizes that are *drawn*; ``used_min_dim`` and ``used_max_dim`` those that are
    kept. They differ where a model adapts both a tall and a wide layer: PEFT then draws for the smaller of the largest
    output and the largest input dimension, of which no layer uses more than its own smaller dimension.

    Attributes:
        rank: r, rows of A.
        min_dim: m, columns of A as drawn.
        max_dim: M, rows of B as drawn.
        key: ``projection_prng_key``, of which the lowest 32 bits count.
        sparsity: s of a ternary basis with P(-1) = P(+1) = 1/(2s); ``None`` for a dense one.
        used_min_dim: columns of A that some layer reads.
        used_max_dim: rows of B that some layer reads.
    """

    rank: int
    min_dim: int
    max_dim: int
    key: int
    sparsity: float | None
    used_min_dim: int
    used_max_dim: int

    @property
    def num_bases(self) -> int:
        """Number of bases n = ceil(m / r) that are drawn."""
        return num_bases(self.rank, self.min_dim)

    @property
    def used_num_bases(self) -> int:
        """Number of bases that some layer reads."""
        return num_bases(self.rank, self.used_min_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, in the form in which it is stored."""
        columns = self.used_num_bases * self.rank
        if self.sparsity is None:
            return 2 * (self.rank * self.used_min_dim + self.used_max_dim * columns)
        return self.rank * self.used_min_dim + self.used_max_dim * codes.bytes_of(columns)

    def whole(self) -> BasisSpec:
        """The same draw with nothing cut away."""
        return BasisSpec(self.rank, self.min_dim, self.max_dim, self.key, self.sparsity, self.min_dim, self.max_dim)


def num_bases(rank: int, min_dim: int) -> int:
    """Number of bases n = ceil(m / r) that make the update full-rank (paper, section 4.2)."""
    return -(-min_dim // rank)


class Basis:
    """One pair of frozen bases, shared by all layers and adapters that use the same numbers.

    Kept in the smallest lossless form: bfloat16 for dense bases; for ternary ones codes, of B four to a byte, and one
    float32 factor each.
    A basis is no part of any module: nothing broadcasts, shards, casts or copies it. Nor may anything write into it,
    which would change every adapter: what users are given are copies.

    Args:
        a: A of shape (r, m), floating point or int8 codes.
        b: B of shape (M, n·r), row-major over (n, r), likewise.
        factors: what the codes of a and b are multiplied with, 1 for dense bases.
        spec: the definition from which the numbers were drawn; ``None`` for numbers that came from a file.
    """

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        factors: tuple[float, float] = (1.0, 1.0),
        spec: BasisSpec | None = None,
    ) -> None:
        self._compact = (a, b if b.is_floating_point() else codes.pack(b))
        self._factors = factors
        self.spec = spec
        self.rank, self.min_dim = a.shape
        self.max_dim, self.num_bases = b.shape[0], b.shape[1] // self.rank
        self._skips_zeros = torch.backends.mkl.is_available() and all(
            not numbers.is_floating_point() and int(numbers.count_nonzero()) <= _MOST_NONZEROS * numbers.numel()
            for numbers in (a, b)
        )
        self._held: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor] | SparseBases] = {}
        self._fingerprint: str | None = None

    @property
    def factor(self) -> float:
        """What ΔW is to be multiplied with where ``operands`` gives bare codes."""
        return self._factors[0] * self._factors[1]

    def operands(
        self, device: torch.device, dtype: torch.dtype, min_dim: int, max_dim: int, num_bases: int
    ) -> DenseBases | SparseBases | GroupedBases:
        """The slices of A and B that a layer multiplies with in ``dtype`` on ``device``, without ``factor``.

        What has to be made for it is made once and kept: a cast of dense bases, the compressed rows of very sparse
        ones. Views of the stored form are taken where products can read that.
        """
        columns = num_bases * self.rank
        if dispatch.why_not(device, dtype) is None:
            A, B = self._grouped(device, dtype if self._is_dense() else torch.int8, columns)
            return GroupedBases(A[:, :min_dim], B[:max_dim])
        if device.type == "cpu" and self._skips_zeros:
            return self._compressed(torch.promote_types(dtype, torch.float32), min_dim, max_dim, columns)
        B = self._compact[1]
        if not self._is_dense() or (B.dtype == torch.bfloat16 and bf16.splits(B.numel(), device, dtype)):
            return self.stored(device, min_dim, max_dim, num_bases)
        A, B = self._on(device, dtype)
        return DenseBases(A[:, :min_dim], B[:max_dim, :columns])

    def stored(self, device: torch.device, min_dim: int, max_dim: int, num_bases: int) -> DenseBases:
        """The slices in the form in which the bases are stored, without ``factor``."""
        A, B = self._on(device)
        columns = num_bases * self.rank
        return DenseBases(A[:, :min_dim], B[:max_dim, : columns if self._is_dense() else None])

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of A, of shape (r, m), and B, of shape (M, n·r), on ``device`` in ``dtype``, as plain numbers."""
        A, B = self._numbers()
        if self._is_dense():
            return A.to(device, dtype, copy=True), B.to(device, dtype, copy=True)
        return tuple(  # type: ignore[return-value]
            (numbers.to(device).float() * factor).to(dtype)
            for numbers, factor in zip((A, B), self._factors, strict=True)
        )

    def projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of A (r, 1, m) and B (M, n, r) on the CPU in the smallest dtype that a file may hold without loss."""
        a, b = self.tensors(torch.device("cpu"), self._compact[0].dtype if self._is_dense() else torch.float32)
        return a.unsqueeze(1), b.view(self.max_dim, self.num_bases, self.rank)

    @property
    def nbytes(self) -> int:
        """Bytes of all forms in which the bases are held."""
        tensors = list(self._compact)
        for held in self._held.values():
            tensors += [*held[:2], *held.places, *held.B] if isinstance(held, SparseBases) else held
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of sizes and numbers, in hexadecimal."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            kind = str(self._compact[0].dtype).removeprefix("torch.")
            digest.update(f"randlora {kind} {self.rank} {self.min_dim} {self.max_dim}".encode())
            digest.update(np.asarray(self._factors, "<f4").tobytes())
            for tensor in self._numbers():
                digest.update(_little_endian(tensor))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def same_numbers(self, A: torch.Tensor, B: torch.Tensor) -> bool:
        """Whether A (r, 1, m) and B (M, n, r) begin with exactly these numbers."""
        if A.ndim != 3 or B.ndim != 3 or A.shape[0] != self.rank or A.shape[2] < self.min_dim:
            return False
        if B.shape[0] < self.max_dim or B.shape[1] < self.num_bases or B.shape[2] != self.rank:
            return False
        theirs = (A[:, :, : self.min_dim], B[: self.max_dim, : self.num_bases])
        return all(_equal(mine, their) for mine, their in zip(self.projections(), theirs, strict=True))

    def covers(self, rank: int, min_dim: int, max_dim: int) -> bool:
        """Whether a layer of that rank and those dimensions finds its slices here."""
        return self.rank == rank and self.min_dim >= min_dim and self.max_dim >= max_dim

    def _is_dense(self) -> bool:
        return self._compact[0].is_floating_point()

    def _numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, or their codes in int8."""
        a, b = self._compact
        return a, b if self._is_dense() else codes.unpack(b, self.num_bases * self.rank, torch.int8)

    def _on(self, device: torch.device, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B whole, cast or as they are stored."""
        if device.type == "meta":
            a, b = (torch.empty_like(t, device=device, dtype=dtype) for t in self._compact)
            return a, b
        if (device, dtype) not in self._held:
            with torch.inference_mode(False), torch.no_grad():
                a, b = (t.to(device) for t in self._compact)
                self._held[device, dtype] = (a, b) if dtype is None else (a.to(dtype), in_units(b, dtype))
        return self._held[device, dtype]  # type: ignore[return-value]

    def _grouped(self, device: torch.device, dtype: torch.dtype, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A whole and the first columns of B, basis by basis: one form for each number of bases."""
        key = ("grouped", device, dtype, columns)
        if key not in self._held:
            with torch.inference_mode(False), torch.no_grad():
                dispatch.kernels(device, torch.bfloat16)  # imported now, before a compiled step needs them
                a, b = self._numbers()
                b = grouped(b[:, :columns], self.rank)
                self._held[key] = (a.to(device, dtype), in_units(b, dtype).to(device))
        return self._held[key]  # type: ignore[return-value]

    def _compressed(self, dtype: torch.dtype, min_dim: int, max_dim: int, columns: int) -> SparseBases:
        """The codes as numbers in compressed rows: one form for each size of layer."""
        key = (dtype, min_dim, max_dim, columns)
        if key not in self._held:
            with torch.inference_mode(False), torch.no_grad():
                a, b = self._numbers()
                a, b = a[:, :min_dim], b[:max_dim, :columns]
                self._held[key] = sparse_bases(a.to(dtype), b.to(dtype))
        return self._held[key]  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict[int, object]) -> Basis:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        if self.spec is not None:
            return get_basis, (self.spec,)
        return basis_from_projections, self.projections()


class AwaitedBasis:
    """Stands where an adapter's bases must come from its file, until the file has been read.

    Args:
        expected: fingerprint that the adapter's config records.
        drawn: fingerprint of the bases that its key and sizes define.
    """

    def __init__(self, expected: str, drawn: str) -> None:
        self.fingerprint = expected
        self._drawn = drawn

    def error(self) -> BasisMismatchError:
        """What to raise when the bases are needed and the file did not hold them."""
        return BasisMismatchError(
            f"the adapter was trained with bases of fingerprint {self.fingerprint}, but its key and the sizes of this "
            f"model define bases of fingerprint {self._drawn}, and no projections were loaded. Load the adapter onto "
            "the model that it was trained for, or, to start a new adapter from its config, set "
            "`basis_fingerprint=None`."
        )


_live: weakref.WeakValueDictionary[BasisSpec | str, Basis] = weakref.WeakValueDictionary()
_live_lock = threading.Lock()


def get_basis(spec: BasisSpec) -> Basis:
    """The bases that ``spec`` defines; drawn once and shared for as long as anything uses them."""
    # bases must serve training too, wherever they were first asked for
    with _live_lock, torch.inference_mode(False):
        basis = _live.get(spec)
        if basis is None:
            basis = _draw_dense(spec) if spec.sparsity is None else _draw_ternary(spec, spec.sparsity)
            _live[spec] = basis
        return basis


def basis_from_projections(A: torch.Tensor, B: torch.Tensor) -> Basis:
    """Bases that a file brought along: A (r, 1, m) and B (M, n, r), floating point.

    Kept in bfloat16 or float16 where that loses nothing, else as they are. Equal numbers are shared.

    Raises:
        BasisMismatchError: if the shapes do not belong together.
    """
    if A.ndim != 3 or B.ndim != 3 or A.shape[1] != 1 or A.shape[0] != B.shape[2] or not A.is_floating_point():
        raise BasisMismatchError(
            f"projections of shapes {tuple(A.shape)} ({A.dtype}) and {tuple(B.shape)} ({B.dtype}) are no RandLoRA "
            "bases; expected floating point A (r, 1, m) and B (M, n, r)"
        )
    dtype = next((d for d in _SHORT_DTYPES if all(torch.equal(t.to(d).to(t.dtype), t) for t in (A, B))), A.dtype)
    with torch.inference_mode(False):
        basis = Basis(
            A.detach().to("cpu", dtype, copy=True).squeeze(1).contiguous(),
            B.detach().to("cpu", dtype, copy=True).flatten(1).contiguous(),
        )
    with _live_lock:
        return _live.setdefault(basis.fingerprint, basis)


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal as numbers, whatever the dtypes."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(dtype), second.to("cpu", dtype))


def _words(key: int, counts: Iterator[int]) -> Iterator[np.ndarray]:
    """Arrays of 24-bit integers (uint32), the low bits of successive MT19937 words."""
    generator = np.random.RandomState(key % 2**32)
    for count in counts:
        yield generator.randint(0, 2**32, size=count, dtype=np.uint32) & np.uint32(0xFFFFFF)


def _chunks(total: int) -> Iterator[int]:
    for start in range(0, total, _WORDS_PER_CHUNK):
        yield min(_WORDS_PER_CHUNK, total - start)


def _draw_dense(spec: BasisSpec) -> Basis:
    """A, then one block (M, 1, r) of B per base: Kaiming-uniform (a=√5) in bfloat16, divided by the own std."""
    r, M, n = spec.rank, spec.max_dim, spec.num_bases
    used_M, used_n = spec.used_max_dim, spec.used_num_bases
    words = _words(spec.key, iter([r * spec.min_dim] + [M * r] * n))

    a_bits = _kaiming_bits(next(words), fan_in=spec.min_dim)
    a_counts = np.bincount(a_bits, minlength=1 << 16)
    b_counts = np.zeros(1 << 16, np.int64)
    b_bits = np.empty((used_M, used_n, r), np.uint16)
    for base, block in enumerate(words):
        bits = _kaiming_bits(block, fan_in=r)
        b_counts += np.bincount(bits, minlength=1 << 16)
        if base < used_n:
            b_bits[:, base] = bits.reshape(M, r)[:used_M]

    a = _divide_by_std(a_bits.reshape(r, spec.min_dim)[:, : spec.used_min_dim], a_counts)
    b = _divide_by_std(b_bits.reshape(used_M, used_n * r), b_counts)
    return Basis(a, b, spec=spec)


def _kaiming_bits(words: np.ndarray, fan_in: int) -> np.ndarray:
    """Bit patterns (uint16) of bfloat16 values, uniform over [-β, β) with β of ``kaiming_uniform_(a=√5)``."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan_in))
    low = np.float32(-bound)
    span = np.float32(np.float32(bound) - low)
    # 24-bit word times 24-bit span, plus low: exact in float64, so that one rounding follows, as of an fma
    values = words.astype(np.float64)
    values *= float(span) * 2.0**-24
    values += float(low)
    bits = _round_to_bfloat16(values.astype(np.float32))
    upper, lower = _round_to_bfloat16(np.array([bound, -bound], np.float32))
    bits[bits == upper] = lower  # the upper bound is excluded, as in torch
    return bits


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of float32 values rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _divide_by_std(bits: np.ndarray, counts: np.ndarray) -> torch.Tensor:
    """bfloat16 quotients of the values and their std, which a histogram gives in any order of summation."""
    patterns = np.arange(1 << 16, dtype=np.uint32)
    values = (patterns << np.uint32(16)).view(np.float32)
    present = np.nonzero(counts)[0]
    std = _std(values[present].astype(np.float64).tolist(), counts[present].tolist())
    std_bf16 = (_round_to_bfloat16(np.array([std], np.float32)).astype(np.uint32) << np.uint32(16)).view(np.float32)[0]
    table = np.zeros(1 << 16, np.uint16)
    table[present] = _round_to_bfloat16(values[present] / std_bf16)
    return torch.from_numpy(table[bits].view(np.int16)).view(torch.bfloat16)


def _std(values: list[float], counts: list[int]) -> float:
    """Sample standard deviation of ``values`` occurring ``counts`` times; 1 where there is none to divide by."""
    total = sum(counts)
    if total < 2:
        return 1.0
    mean = math.fsum(v * c for v, c in zip(values, counts, strict=True)) / total
    variance = math.fsum(c * (v - mean) ** 2 for v, c in zip(values, counts, strict=True)) / (total - 1)
    return math.sqrt(variance) or 1.0


def _draw_ternary(spec: BasisSpec, sparsity: float) -> Basis:
    """A (r, 1, m), then B (M, n, r) in one block: -1, 0 or 1, divided by the own std (Li, Hastie & Church 2006)."""
    r, M, n = spec.rank, spec.max_dim, spec.num_bases
    a_total, b_total = r * spec.min_dim, M * n * r
    words = _words(spec.key, iter([a_total, *_chunks(b_total)]))
    a_codes = _ternary_codes(next(words), sparsity)
    b_codes = np.concatenate([_ternary_codes(chunk, sparsity) for chunk in words])
    used_M, used_n = spec.used_max_dim, spec.used_num_bases
    a = a_codes.reshape(r, spec.min_dim)[:, : spec.used_min_dim]
    b = b_codes.reshape(M, n, r)[:used_M, :used_n].reshape(used_M, used_n * r)
    factors = (_ternary_factor(a_codes), _ternary_factor(b_codes))
    return Basis(torch.from_numpy(np.ascontiguousarray(a)), torch.from_numpy(np.ascontiguousarray(b)), factors, spec)


def _ternary_codes(words: np.ndarray, sparsity: float) -> np.ndarray:
    """int8 codes: -1 where u < 1/(2s), +1 where u > 1 - 1/(2s), for u = word · 2⁻²⁴, compared in float32."""
    uniform = words.astype(np.float32) * np.float32(2.0**-24)
    edge = 1 / (2 * sparsity)
    return (uniform > np.float32(1 - edge)).astype(np.int8) - (uniform < np.float32(edge)).astype(np.int8)


def _ternary_factor(codes: np.ndarray) -> float:
    """What a code is multiplied with: the reciprocal, in float32, of the std rounded to float32."""
    plus, minus = int(np.count_nonzero(codes == 1)), int(np.count_nonzero(codes == -1))
    std = np.float32(_std([-1.0, 0.0, 1.0], [minus, codes.size - plus - minus, plus]))
    return float(np.float32(1) / std)


def _little_endian(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes in little-endian order."""
    if tensor.element_size() == 2:
        return tensor.contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    array = tensor.contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
