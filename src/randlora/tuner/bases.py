"""The bases of an adapter, and how its layers get them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from randlora.ops.bases import AwaitedBasis, Basis, BasisSpec, get_basis
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.layers.base import RandLoraLayer


def define_bases(layers: Sequence[RandLoraLayer], config: RandLoraConfig, adapter_name: str) -> dict[int, BasisSpec]:
    """Return the definitions of the bases that the adapter needs, by rank.

    As PEFT does, they are drawn for the largest output and the largest input dimension among all layers of the
    adapter; the part that no layer reads is not kept.
    """
    largest = (max(layer.out_features for layer in layers), max(layer.in_features for layer in layers))
    min_dim, max_dim = min(largest), max(largest)
    return {
        rank: BasisSpec(
            rank=rank,
            min_dim=min_dim,
            max_dim=max_dim,
            key=config.projection_prng_key % 2**32,
            kind=config.basis_kind(min_dim),
            used_min_dim=max(layer.min_dim for layer in layers),
            used_max_dim=max(layer.max_dim for layer in layers),
        )
        for rank in sorted({layer.r[adapter_name] for layer in layers})
    }


def bind_defined_bases(layers: list[RandLoraLayer], config: RandLoraConfig, adapter_name: str) -> None:
    """Give the layers the bases that the config defines.

    Where the config records the fingerprint of others, they must come from the adapter's file.

    Raises:
        BasisMismatchError: if the config records other bases than its key and the layers' sizes define, and says
            that its file holds none.
    """
    specs = define_bases(layers, config, adapter_name)
    if not config.read_from_file:
        _warn_of_remarks(specs)
    drawn = {rank: get_basis(spec) for rank, spec in specs.items()}
    found = combined_fingerprint(drawn.values())
    bases: dict[int, Basis | AwaitedBasis] = {**drawn}
    if config.basis_fingerprint not in (None, found):
        awaited = AwaitedBasis(config.basis_fingerprint or "", found)
        if not config.save_projection:
            raise awaited.error()
        bases = dict.fromkeys(drawn, awaited)
    for layer in layers:
        layer.bind_basis(adapter_name, bases[layer.r[adapter_name]])


def _warn_of_remarks(specs: Mapping[int, BasisSpec]) -> None:
    for rank, spec in specs.items():
        remark = spec.kind.remark(rank)
        if remark:
            warnings.warn(remark, stacklevel=2)


def fingerprint(layers: list[RandLoraLayer], adapter_name: str) -> str:
    """Return one fingerprint for all bases that the adapter's layers use.

    Raises:
        BasisMismatchError: if they were to come from a file that did not hold them.
    """
    return combined_fingerprint({layer.r[adapter_name]: layer.basis(adapter_name) for layer in layers}.values())


def combined_fingerprint(bases: Iterable[Basis]) -> str:
    """Return the fingerprints of the bases of one adapter, smallest rank first, as one string."""
    return "-".join(basis.fingerprint for basis in sorted(bases, key=lambda basis: basis.rank))
