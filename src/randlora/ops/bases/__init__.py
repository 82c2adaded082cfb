"""The frozen bases A and B: their numbers, their storage and sharing, and the operands of each kind.

A new kind is one file here with an entry in ``KINDS``. Fields of an adapter's config for it go into ``BasisFields``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from randlora.ops.bases.basis import AwaitedBasis, Basis, basis_from_projections, get_basis
from randlora.ops.bases.dense import Dense
from randlora.ops.bases.spec import BasisKind, BasisSpec, num_bases, num_trainable
from randlora.ops.bases.structured import Structured, StructuredFields
from randlora.ops.bases.ternary import Ternary, TernaryFields

KINDS: dict[str, type[BasisKind]] = {kind.name: kind for kind in (Dense, Ternary, Structured)}
"""Every kind of basis by its name."""

CHOICES: dict[str, type[BasisKind]] = {name: kind for kind in KINDS.values() for name in (*kind.flags, *kind.values)}
"""The kinds by the fields of an adapter's config that ask for them."""


@dataclass
class BasisFields(StructuredFields, TernaryFields):
    """The fields of an adapter's config for bases that PEFT does not have."""


def choices_of(config: Mapping[str, Any]) -> list[str]:
    """Return the fields in ``CHOICES`` by which a config asks for a kind of basis: at most one, if it is sound."""
    return [name for name in CHOICES if config.get(name)]


def basis_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of ``values`` whose names are fields of an adapter's config for its bases."""
    names = {name for kind in KINDS.values() for name in (*kind.flags, *kind.values, *kind.options)}
    return {name: value for name, value in values.items() if name in names}


def kind_in_words(config: Mapping[str, Any]) -> str:
    """Return the kind of basis for which a config asks, such as "very sparse"."""
    return next(iter(choices_of(config)), Dense.name).replace("_", " ")


__all__ = [
    "CHOICES",
    "KINDS",
    "AwaitedBasis",
    "Basis",
    "BasisFields",
    "BasisKind",
    "BasisSpec",
    "Dense",
    "Structured",
    "Ternary",
    "basis_fields",
    "basis_from_projections",
    "choices_of",
    "get_basis",
    "kind_in_words",
    "num_bases",
    "num_trainable",
]
