"""Bases that layers and adapters share: drawn once, identified by their numbers, verified by a fingerprint."""

from __future__ import annotations

import hashlib
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from randlora.errors import BasisMismatchError
from randlora.ops.bases.dense import DenseStored
from randlora.ops.bases.spec import BasisSpec, Forms, RowOperands, Stored, nbytes_of
from randlora.ops.operands import Operands, Sizes

_SHORT_DTYPES = (torch.bfloat16, torch.float16)
_MOST_SCALED = 64  # copies of A, each as small as γ of a layer


class Basis:
    """One pair of frozen bases, shared by all layers and adapters that use the same numbers.

    A basis is not part of any module, so that nothing broadcasts, shards, casts or copies it. A write into it would
    change every adapter, so that users get copies.

    Args:
        stored: the numbers, in the form of their kind.
        spec: the definition from which the numbers were drawn; ``None`` for numbers that came from a file.
    """

    def __init__(self, stored: Stored, spec: BasisSpec | None = None) -> None:
        self.stored = stored
        self.spec = spec
        self._scaled = Forms(_MOST_SCALED)
        self._fingerprint: str | None = None

    @property
    def rank(self) -> int:
        """Rank r, rows of A."""
        return self.stored.rank

    @property
    def min_dim(self) -> int:
        """Columns of A, m."""
        return self.stored.min_dim

    @property
    def max_dim(self) -> int:
        """Rows of B, M."""
        return self.stored.max_dim

    @property
    def num_bases(self) -> int:
        """Number n of bases; B has n·r columns."""
        return self.stored.num_bases

    @property
    def repays_holding(self) -> bool:
        """Whether calls are cheaper with a ΔW that is held than without."""
        return self.stored.repays_holding

    @property
    def factor(self) -> float:
        """The factor of ΔW that ``operands`` leaves out."""
        return self.stored.factors[0] * self.stored.factors[1]

    def operands(self, device: torch.device, dtype: torch.dtype, sizes: Sizes, tokens: int | None = None) -> Operands:
        """Return a layer's slices for products in ``dtype`` on ``device``, without ``factor``.

        Forms of the bases are made once and kept. ``tokens`` chooses between a form for few tokens and one for many;
        ``None`` means many.
        """
        return self.stored.operands(device, dtype, sizes, tokens)

    def scaled_operands(
        self, device: torch.device, dtype: torch.dtype, sizes: Sizes, tokens: int, scaling: float
    ) -> Operands:
        """Return ``operands`` with ``scaling`` and ``factor`` multiplied into A.

        Layers of equal sizes and scaling share this A.
        """
        operands, scaling = self.operands(device, dtype, sizes, tokens), scaling * self.factor
        # a compiler may have a symbol for the scaling, which cannot be a key, and fuses the product
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return operands.scaled_by(scaling)
        key = (device, dtype, sizes, type(operands), scaling)
        return self._scaled.get(key, lambda: operands.scaled_by(scaling))

    def lookup(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> RowOperands:
        """Return a layer's slices in their stored form, without ``factor``, for layers that read a few rows of ΔW."""
        return self.stored.lookup(device, dtype, sizes)

    def tensors(self, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> tuple[Tensor, Tensor]:
        """Return copies of A (r, m) and B (M, n·r) on ``device`` in ``dtype``, as plain numbers.

        The sizes are those of a layer; by default, of the largest.
        """
        return self.stored.tensors(device, dtype, sizes)

    def projections(self) -> tuple[Tensor, Tensor]:
        """Return copies of A (r, 1, m) and B (M, n, r) on the CPU in the smallest dtype that loses nothing."""
        a, b = self.stored.file_tensors()
        return a.unsqueeze(1), b.view(self.max_dim, self.num_bases, self.rank)

    @property
    def nbytes(self) -> int:
        """Bytes of all forms in which the bases are held."""
        scaled = (tensor for operands in self._scaled for tensor in operands.tensors())
        return nbytes_of([*self.stored.held(), *scaled])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of sizes and numbers, in hexadecimal."""
        if self._fingerprint is None:
            numbers = self.stored.numbers()
            digest = hashlib.sha256()
            digest.update(f"randlora {self.stored.label} {self.rank} {self.min_dim} {self.max_dim}".encode())
            digest.update(np.asarray(self.stored.factors, "<f4").tobytes())
            for tensor in numbers:
                digest.update(_little_endian(tensor))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def same_numbers(self, A: Tensor, B: Tensor) -> bool:
        """Return whether A (r, 1, m) and B (M, n, r) begin with exactly the numbers of this basis."""
        if A.ndim != 3 or B.ndim != 3 or A.shape[0] != self.rank or A.shape[2] < self.min_dim:
            return False
        if B.shape[0] < self.max_dim or B.shape[1] < self.num_bases or B.shape[2] != self.rank:
            return False
        theirs = (A[:, :, : self.min_dim], B[: self.max_dim, : self.num_bases])
        return all(_equal(mine, their) for mine, their in zip(self.projections(), theirs, strict=True))

    def gives_as(self, other: Basis, sizes: Sizes) -> bool:
        """Return whether a layer of these sizes reads the same numbers from this basis and from ``other``."""
        if self is other:
            return True
        if (self.rank, self.factor) != (other.rank, other.factor):
            return False
        mine, theirs = (basis.operands(torch.device("cpu"), torch.float32, sizes) for basis in (self, other))
        return type(mine) is type(theirs) and all(map(torch.equal, mine.tensors(), theirs.tensors()))

    def covers(self, rank: int, min_dim: int, max_dim: int) -> bool:
        """Return whether the basis has the slices of a layer of that rank and those dimensions."""
        return self.rank == rank and self.min_dim >= min_dim and self.max_dim >= max_dim

    def __deepcopy__(self, memo: dict[int, object]) -> Basis:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        if self.spec is not None:
            return get_basis, (self.spec,)
        return basis_from_projections, self.projections()


class AwaitedBasis:
    """A placeholder for bases that must come from an adapter's file, until the file has been read.

    Args:
        expected: fingerprint that the adapter's config records.
        drawn: fingerprint of the bases that its key and sizes define.
    """

    def __init__(self, expected: str, drawn: str) -> None:
        self.fingerprint = expected
        self._drawn = drawn

    def error(self) -> BasisMismatchError:
        """Return the error for bases that are needed but were not in the file."""
        return BasisMismatchError(
            f"the adapter was trained with bases of fingerprint {self.fingerprint}, but its key and the sizes of this "
            f"model define bases of fingerprint {self._drawn}, and no projections were loaded. Load the adapter onto "
            "the model that it was trained for, or, to start a new adapter from its config, set "
            "`basis_fingerprint=None`."
        )


_live: weakref.WeakValueDictionary[BasisSpec | str, Basis] = weakref.WeakValueDictionary()
_live_lock = threading.Lock()


def get_basis(spec: BasisSpec) -> Basis:
    """Return the bases that ``spec`` defines, drawn once and shared as long as they are in use."""
    # bases first made in inference mode must serve training too
    with _live_lock, torch.inference_mode(False):
        basis = _live.get(spec)
        if basis is None:
            basis = _live[spec] = Basis(spec.kind.draw(spec), spec)
        return basis


def basis_from_projections(A: Tensor, B: Tensor) -> Basis:
    """Return bases from the tensors of a file: A (r, 1, m) and B (M, n, r), floating point.

    They are kept in bfloat16 or float16 if that loses nothing, else in their own dtype. Equal numbers are shared.

    Raises:
        BasisMismatchError: if the shapes do not match, or the numbers are not floating point.
    """
    if A.ndim != 3 or B.ndim != 3 or A.shape[1] != 1 or A.shape[0] != B.shape[2] or not A.is_floating_point():
        raise BasisMismatchError(
            f"projections of shapes {tuple(A.shape)} ({A.dtype}) and {tuple(B.shape)} ({B.dtype}) are no RandLoRA "
            "bases; expected floating point A (r, 1, m) and B (M, n, r)"
        )
    dtype = next((d for d in _SHORT_DTYPES if all(torch.equal(t.to(d).to(t.dtype), t) for t in (A, B))), A.dtype)
    with torch.inference_mode(False):
        stored = DenseStored(
            A.detach().to("cpu", dtype, copy=True).squeeze(1).contiguous(),
            B.detach().to("cpu", dtype, copy=True).flatten(1).contiguous(),
        )
    basis = Basis(stored)
    with _live_lock:
        return _live.setdefault(basis.fingerprint, basis)


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether tensors of any dtypes are equal as numbers."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(dtype), second.to("cpu", dtype))


def _little_endian(tensor: Tensor) -> bytes:
    """Return the tensor's bytes in little-endian order."""
    if tensor.element_size() == 2:
        return tensor.contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    array = tensor.contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
