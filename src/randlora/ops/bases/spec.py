"""The definition of a pair of bases, and the protocol of a kind of basis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from randlora.ops.operands import Operands, Sizes
from randlora.ops.plan import Costs

T = TypeVar("T")


@dataclass(frozen=True)
class BasisSpec:
    """The definition of the numbers of a pair of bases.

    ``min_dim`` and ``max_dim`` are the sizes that are *drawn*, ``used_min_dim`` and ``used_max_dim`` the sizes that are
    kept. They differ for a model with both a tall and a wide adapted layer: PEFT draws columns for the smaller of the
    largest output and the largest input dimension, but a layer uses only as many as its own smaller dimension.

    Attributes:
        rank: r, rows of A.
        min_dim: m, columns of A as drawn.
        max_dim: M, rows of B as drawn.
        key: ``projection_prng_key``; only its lowest 32 bits count.
        kind: the kind of basis, with its options.
        used_min_dim: columns of A that some layer reads.
        used_max_dim: rows of B that some layer reads.
    """

    rank: int
    min_dim: int
    max_dim: int
    key: int
    kind: BasisKind
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
    def entries(self) -> int:
        """Number of entries of A and B that are kept."""
        return self.rank * self.used_min_dim + self.used_max_dim * self.used_num_bases * self.rank

    @property
    def nbytes(self) -> int:
        """Bytes of the form in which the bases are stored."""
        return self.kind.nbytes(self)

    def whole(self) -> BasisSpec:
        """Return the definition of the same draw, kept whole."""
        return BasisSpec(self.rank, self.min_dim, self.max_dim, self.key, self.kind, self.min_dim, self.max_dim)


def num_bases(rank: int, min_dim: int) -> int:
    """Return the number of bases n = ceil(m / r) that make the update full-rank (paper, section 4.2)."""
    return -(-min_dim // rank)


def num_trainable(rank: int, min_dim: int) -> int:
    """Return the number of trained values of a layer, n·(r + m): those of λ and γ."""
    return num_bases(rank, min_dim) * (rank + min_dim)


class BasisKind(Protocol):
    """A kind of basis: a frozen dataclass whose fields are its options. Each has a file here and an entry in ``KINDS``.

    An adapter's config asks for a kind by one of its ``flags`` or ``values``, and for dense bases by none. If PEFT's
    own RandLora lacks these fields, the kind's file has a dataclass of them, from which the config inherits.

    Attributes:
        name: name of the kind for users.
        flags: fields of a config that ask for the kind if ``True``.
        values: fields of a config that ask for the kind if a number is given.
        options: further fields of a config, without meaning for other kinds.
        file_type: type of an adapter in its file, which makes PEFT's own RandLora refuse the file; ``None`` if PEFT
            computes the same.
        file_itemsize: bytes of a number in a file that PEFT reads; 0 if files do not hold the bases.
    """

    name: ClassVar[str]
    flags: ClassVar[tuple[str, ...]]
    values: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]]
    file_type: ClassVar[str | None]
    file_itemsize: ClassVar[int]

    @classmethod
    def asked(cls, config: Any, min_dim: int) -> BasisKind:
        """Return the kind with the options of a config that asks for it; ``min_dim`` is m as drawn."""

    @classmethod
    def faults(cls, config: Any) -> list[str]:
        """Return one sentence for each invalid value of the kind's fields in a config."""

    def remark(self, rank: int) -> str:
        """Return advice for users about bases of that rank, or an empty string."""

    def draw(self, spec: BasisSpec) -> Stored:
        """Return the numbers that ``spec`` defines, the same on every machine."""

    def unfilled(self, spec: BasisSpec) -> Stored:
        """Return an uninitialised form of these sizes on torch's default device, to trace a step with."""

    def nbytes(self, spec: BasisSpec) -> int:
        """Return the bytes that the stored form takes."""

    def costs(self, rank: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, tokens: int) -> Costs:
        """Return the costs of the operands that a layer of these sizes would get, without a draw."""


class Stored(Protocol):
    """A and B in the smallest lossless form, and the operands that are made of it.

    Attributes:
        rank: r.
        min_dim: m, columns of A.
        max_dim: M, rows of B.
        num_bases: n.
        factors: factors of the numbers of A and of B, which operands leave out.
        label: name of the form in the fingerprint.
        repays_holding: whether calls are cheaper with a ΔW that is held than without.
        forms: the forms that have been made for products.
    """

    rank: int
    min_dim: int
    max_dim: int
    num_bases: int
    factors: tuple[float, float]
    label: str
    repays_holding: bool
    forms: Forms

    def operands(self, device: torch.device, dtype: torch.dtype, sizes: Sizes, tokens: int | None) -> Operands:
        """Return a layer's slices for products in ``dtype`` on ``device``, without the factors.

        Forms of the bases are made once and kept. ``tokens`` chooses between a form for few tokens and one for many;
        ``None`` means many.
        """

    def lookup(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> RowOperands:
        """Return a layer's slices in their stored form, for layers that read a few rows of ΔW."""

    def tensors(self, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> tuple[Tensor, Tensor]:
        """Return copies of A (r, m) and B (M, n·r), row-major over (n, r), as plain numbers with their factors.

        The sizes are those of a layer; by default, of the largest.
        """

    def file_tensors(self) -> tuple[Tensor, Tensor]:
        """Return ``tensors`` on the CPU in the smallest dtype that a file may hold without loss."""

    def numbers(self) -> tuple[Tensor, ...]:
        """Return all drawn numbers, which the fingerprint covers."""

    def held(self) -> list[Tensor]:
        """Return the tensors of all forms."""


class RowOperands(Operands, Protocol):
    """Operands that also give single rows of the update."""

    def rows(self, ids: Tensor, scaled: Any, wide: bool) -> Tensor:
        """Return rows ``ids`` of B Ã if ``wide``, else of its transpose: (*ids, m) or (*ids, M)."""

    def table(self, scaled: Any, wide: bool) -> Tensor:
        """Return all rows: B Ã if ``wide``, else its transpose."""


class Forms:
    """The forms of a pair of bases that have been made for products, by their purpose.

    Args:
        most: largest number of forms; one more releases all. ``None`` sets no limit.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._made: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return the form for ``key``, made at the first call."""
        found = self._made.get(key)
        if found is None and torch.compiler.is_compiling():
            found = make()  # Dynamo enters no lock: the call makes the form, and later ones find it
            if torch.is_grad_enabled():  # autograd cannot save a form that was made in inference mode
                self._made[key] = found
        elif found is None:
            # forms first made in inference mode must serve training too
            with self._lock, torch.inference_mode(False), torch.no_grad():
                found = self._made.get(key)
                if found is None:
                    if self._most is not None and len(self._made) >= self._most:
                        self._made.clear()
                    found = self._made[key] = make()
        return found

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._made.values()))


def on_meta(like: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor on the meta device with the shape of ``like``, in ``dtype`` or its own dtype."""
    return torch.empty_like(like, device="meta", dtype=dtype)


def nbytes_of(tensors: list[Tensor]) -> int:
    """Return the bytes of the storages of ``tensors``, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
