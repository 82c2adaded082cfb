"""The frozen bases A and B: which numbers they are, how they are kept and shared, and the operands of each kind.

A new kind is one file here, with a place in ``KINDS``.
"""

from randlora.ops.bases.basis import AwaitedBasis, Basis, basis_from_projections, get_basis
from randlora.ops.bases.dense import Dense
from randlora.ops.bases.spec import BasisKind, BasisSpec, num_bases, num_trainable
from randlora.ops.bases.structured import Structured
from randlora.ops.bases.ternary import Ternary

KINDS: dict[str, type[BasisKind]] = {kind.name: kind for kind in (Dense, Ternary, Structured)}
"""Every kind of basis by its name."""

__all__ = [
    "KINDS",
    "AwaitedBasis",
    "Basis",
    "BasisKind",
    "BasisSpec",
    "Dense",
    "Structured",
    "Ternary",
    "basis_from_projections",
    "get_basis",
    "num_bases",
    "num_trainable",
]
