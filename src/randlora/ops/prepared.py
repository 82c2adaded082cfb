"""All of a call that depends neither on x nor on λ and γ, prepared once for calls that are alike.

With few tokens, host time decides: slices of the bases, their costs and the plan take longer than the products.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from randlora.ops import plan, rounding
from randlora.ops.bases import AwaitedBasis, Basis
from randlora.ops.gpu import availability
from randlora.ops.operands import Operands
from randlora.ops.plan import Plan

_MOST = 256  # of a layer: lengths of sequences may be many


class Prepared(NamedTuple):
    """A call, prepared.

    Attributes:
        operands: the layer's slices of the bases, scaled.
        plan: how output and gradients are computed.
        out_features: of the layer.
    """

    operands: Operands
    plan: Plan
    out_features: int


class PreparedCalls:
    """The prepared calls of one layer.

    A call is served while it would be prepared in the same way: for the same key, from the same basis, under the same
    settings of the process. These are compared as objects, which are held here.
    """

    def __init__(self) -> None:
        self._calls: dict[Hashable, tuple[Prepared, tuple[Any, ...]]] = {}

    def get(self, key: Hashable, basis: Basis | AwaitedBasis) -> Prepared | None:
        """Return the call for ``key``, an adapter and all of an input that counts, if it is there."""
        found = self._calls.get(key)
        return found[0] if found is not None and found[1] == _made_from(basis) else None

    def keep(self, key: Hashable, basis: Basis, prepared: Prepared) -> Prepared:
        """Keep and return the call for ``key``."""
        if len(self._calls) >= _MOST:
            self._calls.clear()
        self._calls[key] = (prepared, _made_from(basis))
        return prepared

    def clear(self) -> None:
        """Let all calls go."""
        self._calls.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> PreparedCalls:
        return PreparedCalls()

    def __reduce__(self) -> tuple[type[PreparedCalls], tuple[()]]:
        return PreparedCalls, ()


def _made_from(basis: Basis | AwaitedBasis) -> tuple[Any, ...]:
    """All that a call is prepared from besides its key: the basis and the settings of the process."""
    return basis, plan.rates, plan.gpu_rates, plan._forced, availability._enabled, rounding._stochastic
