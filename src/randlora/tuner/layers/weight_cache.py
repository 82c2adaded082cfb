"""Updates ΔW that layers keep between calls, within a budget of bytes.

ΔW depends only on λ, γ, the scaling and the bases. While these do not change, evaluation would compute the same update
for every token. A kept update costs only a second product with a matrix of the base layer's size. In training, an
update is valid for one optimiser step: kept, it serves the backward and all micro-batches of gradient accumulation, for
the price of a copy of the weight. The budget for training is 0 by default, so that copies are kept only on request.

A kept update serves only the λ and γ of which it was made. Each call compares λ and γ, which are small, bit by bit with
copies, and the bases, which are never written, as objects. Addresses, version counters and hooks of optimisers would
not do, since there are writes that change none of them. A kept update does not include W, since comparing W would cost
more than the second product.

On devices other than the CPU no update is kept: each comparison would make the host wait for the device.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from randlora.ops.bases import Basis


@dataclass
class _Budget:
    evaluation: int = 2 << 30
    training: int = 0


_budget = _Budget()
_holders: set[weakref.ref[HeldUpdate]] = set()  # copied in one step, while other threads add to it
_lock = threading.Lock()


def set_weight_cache(*, evaluation: int | None = None, training: int | None = None) -> None:
    """Set the number of bytes that all adapted layers of the process together may keep as updates ΔW.

    Updates beyond a lowered budget are released. Layers without room in the budget compute as without a cache.

    Args:
        evaluation: bytes for calls in ``eval()`` mode without gradients; 2 GiB unless set.
        training: bytes for calls with gradients; 0 unless set.

    Raises:
        ValueError: for a negative number.
    """
    for name, value in (("evaluation", evaluation), ("training", training)):
        if value is None:
            continue
        if value < 0:
            raise ValueError(f"the {name} budget is a number of bytes from 0 (hold nothing), got {value}")
        setattr(_budget, name, value)
    for holder in _living():
        if held_bytes() > max(_budget.evaluation, _budget.training):
            holder.release()


def held_bytes() -> int:
    """Return the bytes of all kept updates, and of the copies of the λ and γ of which they were made."""
    return sum(holder.nbytes for holder in _living())


def may_hold(training: bool) -> bool:
    """Return whether the budget is above 0."""
    return (_budget.training if training else _budget.evaluation) > 0


class Term(NamedTuple):
    """The values of which the update of one adapter is made."""

    basis: Basis
    scaling: float
    lam: Tensor
    gamma: Tensor


class _Copy:
    """A copy of a term."""

    def __init__(self, term: Term) -> None:
        self._basis = weakref.ref(term.basis)  # a dead reference never equals a new basis at the same address
        self._scaling = term.scaling
        self.lam, self.gamma = (t.detach().clone(memory_format=torch.contiguous_format) for t in (term.lam, term.gamma))

    def is_of(self, term: Term) -> bool:
        """Return whether the term would give the same update."""
        if self._basis() is not term.basis or self._scaling != term.scaling:
            return False
        return _same_bits(self.lam, term.lam) and _same_bits(self.gamma, term.gamma)


class _Held(NamedTuple):
    copies: list[_Copy]
    update: Tensor

    @property
    def nbytes(self) -> int:
        return self.update.untyped_storage().nbytes() + sum(c.lam.nbytes + c.gamma.nbytes for c in self.copies)


class HeldUpdate:
    """The place of one layer for the update ΔW (out, in) of its adapters."""

    def __init__(self) -> None:
        self._held: _Held | None = None
        self._spent: tuple[Hashable, float] = (None, 0.0)
        _holders.add(weakref.ref(self, _holders.discard))

    @property
    def nbytes(self) -> int:
        """Bytes that this layer holds."""
        held = self._held
        return 0 if held is None else held.nbytes

    def get(self, terms: Sequence[Term], dtype: torch.dtype) -> Tensor | None:
        """Return the update in ``dtype`` that was made of exactly these terms; release any other."""
        held = self._held
        if held is None:
            return None
        same = held.update.dtype == dtype and len(terms) == len(held.copies)
        if same and all(copy.is_of(term) for copy, term in zip(held.copies, terms, strict=True)):
            return held.update
        self.release()
        return None

    def pays(self, names: Hashable, call: float, making: float) -> bool:
        """Return whether the calls with these adapters so far, this one included, have cost as much as the update."""
        spent = call + (self._spent[1] if self._spent[0] == names else 0.0)
        self._spent = (names, spent)
        return spent >= making

    def make(
        self, terms: Sequence[Term], make: Callable[[Sequence[Term]], Tensor], nbytes: int, training: bool
    ) -> Tensor | None:
        """Make, keep and return the update of ``nbytes``, or return ``None`` if the budget has no room."""
        nbytes += sum(term.lam.nbytes + term.gamma.nbytes for term in terms)
        with _lock, torch.inference_mode(False), torch.no_grad():
            if held_bytes() + nbytes > (_budget.training if training else _budget.evaluation):
                return None
            copies = [_Copy(term) for term in terms]
            # from the copies, since later calls compare with those
            made = make([term._replace(lam=c.lam, gamma=c.gamma) for term, c in zip(terms, copies, strict=True)])
            self._held = _Held(copies, made)
        return made

    def release(self) -> None:
        """Release the update."""
        self._held, self._spent = None, (None, 0.0)

    def __deepcopy__(self, memo: dict[int, object]) -> HeldUpdate:
        return HeldUpdate()

    def __reduce__(self) -> tuple[type[HeldUpdate], tuple[()]]:
        return HeldUpdate, ()


def can_compare(term: Term) -> bool:
    """Return whether the bits of λ and γ can be read: plain parameters in the memory of the host."""
    return all(type(t) is nn.Parameter and t.device.type == "cpu" and t.is_contiguous() for t in (term.lam, term.gamma))


def _living() -> list[HeldUpdate]:
    return [holder for ref in _holders.copy() if (holder := ref()) is not None]


_memcmp = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_memcmp.argtypes, _memcmp.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, NaN included; ``torch.equal`` takes several times longer."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return _memcmp(first.data_ptr(), second.data_ptr(), first.nbytes) == 0
