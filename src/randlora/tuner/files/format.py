"""How names are spelt in an adapter's file: PEFT's way, once for everything here that reads or writes one."""

from __future__ import annotations

HOST = "base_model."
"""Before the names of tensors that belong to the whole model, such as the bases."""

PREFIX = f"{HOST}model."
"""Before the names of tensors of the base model's modules."""

LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"
"""The last parts of the names of λ and γ."""

NO_STRUCTURED_BASES = (
    "which structured bases never are: they are not written, and always drawn again. The file is damaged, or belongs "
    "to another config"
)
"""Why a file that holds bases is refused for an adapter whose bases are structured."""


def in_file(name: str) -> str:
    """Return the name in a file of a tensor that has ``name`` in the base model."""
    return PREFIX + name


def in_base(name: str) -> str:
    """Return the name in the base model of a tensor that has ``name`` in a file."""
    return name.removeprefix(PREFIX)
