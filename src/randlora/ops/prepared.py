"""All of a call that depends neither on x nor on λ and γ, prepared once for calls that are alike.

With few tokens, host time decides: slices of the bases, their costs and the plan take longer than the products.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from randlora.ops import plan, rounding
from randlora.ops.bases import Basis
from randlora.ops.gpu import availability
from randlora.ops.operands import Operands
from randlora.ops.plan import Plan, Problem, choose

_MOST = 256  # of a layer: lengths of sequences may be many


class Prepared(NamedTuple):
    """A call, prepared.

    Attributes:
        operands: the layer's slices of the bases.
        plan: how output and gradients are computed.
        factor: what the update of the operands is multiplied with.
    """

    operands: Operands
    plan: Plan
    factor: float


class PreparedCalls:
    """The prepared calls of one layer.

    A call is served while it would be prepared in the same way: for the same key, from the same basis, under the same
    settings of the process. These are compared as objects, which are held here.
    """

    def __init__(self) -> None:
        self._calls: dict[Hashable, tuple[Prepared, Basis, tuple[Any, ...]]] = {}

    def get(self, key: Hashable, basis: Basis, make: Callable[[], tuple[Operands, Problem]]) -> Prepared:
        """Return the call for ``key``, an adapter and all of an input that counts; ``make`` gives what it needs."""
        settings = (plan.rates, plan.gpu_rates, plan.forced(), availability.enabled(), rounding.is_enabled())
        found = self._calls.get(key)
        if found is not None and found[1] is basis and found[2] == settings:
            return found[0]
        operands, problem = make()
        prepared = Prepared(operands, choose(problem), basis.factor)
        if len(self._calls) >= _MOST:
            self._calls.clear()
        self._calls[key] = (prepared, basis, settings)
        return prepared

    def clear(self) -> None:
        """Let all calls go."""
        self._calls.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> PreparedCalls:
        return PreparedCalls()

    def __reduce__(self) -> tuple[type[PreparedCalls], tuple[()]]:
        return PreparedCalls, ()
