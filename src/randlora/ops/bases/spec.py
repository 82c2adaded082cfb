"""The definition of a pair of bases, and what a kind of basis has to give."""

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
    """Everything that the numbers of a pair of bases depend on.

    ``min_dim`` and ``max_dim`` are the sizes that are *drawn*; ``used_min_dim`` and ``used_max_dim`` those that are
    kept. They differ where a model adapts both a tall and a wide layer: PEFT then draws for the smaller of the largest
    output and the largest input dimension, of which no layer uses more than its own smaller dimension.

    Attributes:
        rank: r, rows of A.
        min_dim: m, columns of A as drawn.
        max_dim: M, rows of B as drawn.
        key: ``projection_prng_key``, of which the lowest 32 bits count.
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
        """Numbers of A and B that are kept."""
        return self.rank * self.used_min_dim + self.used_max_dim * self.used_num_bases * self.rank

    @property
    def nbytes(self) -> int:
        """Bytes of the form in which the bases are stored."""
        return self.kind.nbytes(self)

    def whole(self) -> BasisSpec:
        """Return the same draw with nothing cut away."""
        return BasisSpec(self.rank, self.min_dim, self.max_dim, self.key, self.kind, self.min_dim, self.max_dim)


def num_bases(rank: int, min_dim: int) -> int:
    """Return the number of bases n = ceil(m / r) that make the update full-rank (paper, section 4.2)."""
    return -(-min_dim // rank)


def num_trainable(rank: int, min_dim: int) -> int:
    """Return the number of trained values of a layer, n·(r + m): those of λ and γ."""
    return num_bases(rank, min_dim) * (rank + min_dim)


class BasisKind(Protocol):
    """A kind of basis: a frozen dataclass whose fields are its options. Each has a file here and a place in ``KINDS``.

    An adapter's config asks for a kind by one of its ``flags`` or ``values``, without any for dense bases. Where PEFT's
    own RandLora does not have these fields, the kind's file has a dataclass of them, from which the config inherits.

    Attributes:
        name: as users call it.
        flags: the fields of a config of which ``True`` asks for the kind.
        values: the fields of which a number asks for it.
        options: the further fields, which mean nothing for other kinds.
        file_type: the type of an adapter in its file, which makes PEFT's own RandLora refuse it; ``None`` where PEFT
            computes the same.
        file_itemsize: bytes of a number in a file that PEFT reads; 0 where no file holds the bases.
    """

    name: ClassVar[str]
    flags: ClassVar[tuple[str, ...]]
    values: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]]
    file_type: ClassVar[str | None]
    file_itemsize: ClassVar[int]

    @classmethod
    def asked(cls, config: Any, min_dim: int) -> BasisKind:
        """Return the kind for which a config asks by fields of this kind; ``min_dim`` is m as drawn."""

    @classmethod
    def faults(cls, config: Any) -> list[str]:
        """Return one sentence for each value of the kind's fields in a config that cannot mean anything."""

    def remark(self, rank: int) -> str:
        """Return a sentence on bases of that rank which their user should know, or nothing."""

    def draw(self, spec: BasisSpec) -> Stored:
        """Return the numbers that ``spec`` defines: the same on every machine."""

    def unfilled(self, spec: BasisSpec) -> Stored:
        """Return a form of these sizes without particular numbers, on torch's default device, to follow a step with."""

    def nbytes(self, spec: BasisSpec) -> int:
        """Return the bytes that the stored form takes."""

    def costs(self, rank: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, tokens: int) -> Costs:
        """Return the costs of the operands that a layer of these sizes would get; nothing is drawn."""


class Stored(Protocol):
    """A and B in the smallest form that loses nothing, and the operands that are made of it.

    Attributes:
        rank: r.
        min_dim: m, columns of A.
        max_dim: M, rows of B.
        num_bases: n.
        factors: what the numbers of A and of B are to be multiplied with: operands leave these out.
        label: how the numbers are kept, as the fingerprint names it.
        repays_holding: whether calls are cheaper with a ΔW that is held than without.
        forms: those that have been made of the numbers.
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

        Whatever has to be made for them is made once and kept. ``tokens`` chooses between forms of which one is
        better for few tokens; ``None`` stands for many.
        """

    def lookup(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> RowOperands:
        """Return a layer's slices as they are stored, for layers that read a few rows of ΔW."""

    def tensors(self, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> tuple[Tensor, Tensor]:
        """Return copies of A (r, m) and B (M, n·r), row-major over (n, r), as plain numbers with their factors.

        They are those of a layer of these sizes, or of the largest.
        """

    def file_tensors(self) -> tuple[Tensor, Tensor]:
        """Return ``tensors`` on the CPU in the smallest dtype that a file may hold without loss."""

    def numbers(self) -> tuple[Tensor, ...]:
        """Return everything that was drawn, which the fingerprint covers."""

    def held(self) -> list[Tensor]:
        """Return the tensors of all forms."""


class RowOperands(Operands, Protocol):
    """Operands that also give single rows of the update."""

    def rows(self, ids: Tensor, scaled: Any, wide: bool) -> Tensor:
        """Return rows ``ids`` of B Ã if ``wide``, else of its transpose: (*ids, m) or (*ids, M)."""

    def table(self, scaled: Any, wide: bool) -> Tensor:
        """Return all rows: B Ã if ``wide``, else its transpose."""


class Forms:
    """The forms of a pair of bases that have been made for products, by what they are for.

    Args:
        most: how many may be held; beyond that all are let go. ``None`` stands for any number.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._made: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return the form for ``key``; it is made once."""
        found = self._made.get(key)
        if found is None and torch.compiler.is_compiling():
            found = make()  # Dynamo enters no lock: the call makes the form, and later ones find it
            if torch.is_grad_enabled():  # what inference mode makes must not serve training, which saves it
                self._made[key] = found
        elif found is None:
            # they must serve training too, wherever they were first asked for
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
    """Return a tensor without memory of that shape, in ``dtype`` or its own."""
    return torch.empty_like(like, device="meta", dtype=dtype)


def nbytes_of(tensors: list[Tensor]) -> int:
    """Return the bytes of the storages of ``tensors``, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
