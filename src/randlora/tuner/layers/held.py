"""Adapted weights that layers keep between calls, within a budget of bytes.

W + ΔW depends on λ, γ and W only. While they do not change, evaluation would compute the same sum for every token;
kept, an unmerged adapter costs what the base layer costs. In training the sum lives for one optimiser step: kept, it
serves the backward too, and all micro-batches of gradient accumulation, for the price of a copy of the weight. So
that training holds no copy unless asked to, its budget is 0 by default.

A sum is let go when λ, γ or W change (by their version counters; writing through ``.data`` escapes these), on
``train()``, on moves of device or dtype, on merging, and with the layer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class _Budget:
    evaluation: int = 2 << 30
    training: int = 0


_budget = _Budget()
_holders: weakref.WeakSet[HeldWeight] = weakref.WeakSet()
_lock = threading.Lock()


def set_weight_cache(*, evaluation: int | None = None, training: int | None = None) -> None:
    """Sets how many bytes all adapted layers of the process together may hold as sums W + ΔW.

    What is held beyond a lowered budget is let go. Layers that find no room compute as without a cache.

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
    for holder in list(_holders):
        if held_bytes() > max(_budget.evaluation, _budget.training):
            holder.release()


def held_bytes() -> int:
    """Bytes that all adapted layers hold as sums W + ΔW."""
    return sum(holder.nbytes for holder in list(_holders))


def may_hold(training: bool) -> bool:
    """Whether there is a budget at all."""
    return (_budget.training if training else _budget.evaluation) > 0


class HeldWeight:
    """The place of one layer for its sum W + ΔW."""

    def __init__(self) -> None:
        self._held: tuple[Hashable, Tensor] | None = None
        self._spent: tuple[Hashable, float] = (None, 0.0)
        _holders.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes that this layer holds."""
        held = self._held
        return 0 if held is None else held[1].untyped_storage().nbytes()

    def get(self, key: Hashable) -> Tensor | None:
        """The sum that was made for ``key``."""
        held = self._held
        return held[1] if held is not None and held[0] == key else None

    def pays(self, key: Hashable, call: float, making: float) -> bool:
        """Whether the calls for ``key``, this one included, have cost as much as making the sum would."""
        spent = call + (self._spent[1] if self._spent[0] == key else 0.0)
        self._held, self._spent = None, (key, spent)
        return spent >= making

    def make(self, key: Hashable, make: Callable[[], Tensor], nbytes: int, training: bool) -> Tensor | None:
        """Makes and keeps the sum of ``nbytes`` if the budget has room."""
        with _lock:
            if held_bytes() + nbytes > (_budget.training if training else _budget.evaluation):
                return None
            made = make()
            self._held = (key, made)
        return made

    def release(self) -> None:
        """Lets the sum go."""
        self._held, self._spent = None, (None, 0.0)

    def __deepcopy__(self, memo: dict[int, object]) -> HeldWeight:
        return HeldWeight()

    def __reduce__(self) -> tuple[type[HeldWeight], tuple[()]]:
        return HeldWeight, ()
