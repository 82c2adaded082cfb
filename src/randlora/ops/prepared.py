"""The part of a call that depends neither on x nor on λ and γ, prepared once for calls that are alike.

With few tokens, the host limits the speed: slices of the bases, their costs and the plan take longer than the products.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from randlora.ops import plan, rounding
from randlora.ops.bases import AwaitedBasis, Basis
from randlora.ops.gpu import availability
from randlora.ops.operands import Operands
from randlora.ops.plan import Plan

_MOST = 256  # calls of a layer, since inputs may have many lengths


class Prepared(NamedTuple):
    """A prepared call.

    Attributes:
        operands: the layer's slices of the bases, scaled.
        plan: the ways in which output and gradients are computed.
        out_features: rows of the layer's weight.
    """

    operands: Operands
    plan: Plan
    out_features: int


class PreparedCalls:
    """The prepared calls of one layer.

    A call is found again as long as it would be prepared in the same way: for the same key, from the same basis, under
    the same settings of the process. The basis and the settings are compared as objects, and kept here.
    """

    def __init__(self) -> None:
        self._calls: dict[Hashable, tuple[Prepared, tuple[Any, ...]]] = {}

    def get(self, key: Hashable, basis: Basis | AwaitedBasis) -> Prepared | None:
        """Return the call for ``key``, or ``None``; the key names an adapter and the properties of an input."""
        found = self._calls.get(key)
        return found[0] if found is not None and found[1] == _made_from(basis) else None

    def keep(self, key: Hashable, basis: Basis, prepared: Prepared) -> Prepared:
        """Keep and return the call for ``key``."""
        if len(self._calls) >= _MOST:
            self._calls.clear()
        self._calls[key] = (prepared, _made_from(basis))
        return prepared

    def clear(self) -> None:
        """Release all calls."""
        self._calls.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> PreparedCalls:
        return PreparedCalls()

    def __reduce__(self) -> tuple[type[PreparedCalls], tuple[()]]:
        return PreparedCalls, ()


def _made_from(basis: Basis | AwaitedBasis) -> tuple[Any, ...]:
    """Return the basis and the settings of the process, from which a call is prepared besides its key."""
    return basis, plan.rates, plan.gpu_rates, plan._forced, availability._enabled, rounding._stochastic
