"""How names are spelt in an adapter's file: PEFT's way, once for everything here that reads or writes one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from randlora.errors import CheckpointError
from randlora.ops.bases import BasisKind

HOST = "base_model."
"""Before the names of tensors that belong to the whole model, such as the bases."""

PREFIX = f"{HOST}model."
"""Before the names of tensors of the base model's modules."""

LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"
"""The last parts of the names of λ and γ."""

USED = "_used"
"""The end of the names of bases that the file holds in part: as much as some layer reads."""

_BASES = {f"randlora_{letter}{end}": letter for letter in "AB" for end in ("", USED)}


class BasisNames(NamedTuple):
    """The names in a file of a pair of bases."""

    A: str
    B: str

    @property
    def whole(self) -> bool:
        """Whether the file holds the bases whole, and not only the part that some layer reads."""
        return not self.A.endswith(USED)


class Parts(NamedTuple):
    """The names in an adapter's file.

    Attributes:
        updates: of λ and γ.
        bases: of each pair of bases, by the module that the file gives it for.
        others: of all other tensors, which were trained in full.
    """

    updates: list[str]
    bases: dict[str, BasisNames]
    others: list[str]


def parts_of(names: Iterable[str], kind: type[BasisKind], file: str = "the file") -> Parts:
    """Return the names in an adapter's file, parted.

    Args:
        names: all names in the file.
        kind: of the adapter's bases.
        file: as errors name it.

    Raises:
        CheckpointError: if the file holds one basis of a pair, or bases of a kind that no file holds.
    """
    updates, found, others = [], dict[str, dict[str, str]](), []
    for name in names:
        owner, _, last = name.rpartition(".")
        if last in (LAMBDA, GAMMA):
            updates.append(name)
        elif last in _BASES:
            found.setdefault(owner, {})[_BASES[last]] = name
        else:
            others.append(name)
    for owner, pair in found.items():
        if len(pair) < 2:
            raise CheckpointError(f"{file} holds only randlora_{next(iter(pair))} of the two bases of {owner!r}")
    if found and not kind.file_itemsize:
        raise CheckpointError(
            f"{file} holds bases ({', '.join(sorted(found))}), where {kind.name} bases never are: they are not "
            "written, and always drawn again. The file is damaged, or belongs to another config"
        )
    return Parts(updates, {owner: BasisNames(**pair) for owner, pair in found.items()}, others)


def in_file(name: str) -> str:
    """Return the name in a file of a tensor that has ``name`` in the base model."""
    return PREFIX + name


def in_base(name: str) -> str:
    """Return the name in the base model of a tensor that has ``name`` in a file."""
    return name.removeprefix(PREFIX)
