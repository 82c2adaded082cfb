"""The content of an adapter's file, and its way back into a model.

Names are PEFT's: ``...<module>.randlora_lambda`` and ``..._gamma`` per layer, ``base_model.randlora_A`` and ``..._B``
once per model. Where no layer reads the whole bases, only the part that some layer reads is written, under names of
our own (``randlora_A_used``), which PEFT passes over: it draws the same numbers from the key. PEFT's own files repeat
the bases for each layer; all copies are read and compared.
"""

from __future__ import annotations

import math
import warnings

from torch import Tensor, nn

from randlora.errors import BasisMismatchError, CheckpointError
from randlora.ops.bases import AwaitedBasis, Basis, basis_from_projections, get_basis
from randlora.tuner.bases import fingerprint
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.files.format import GAMMA, USED, parts_of
from randlora.tuner.layers.base import RandLoraLayer, adapted


def projections_to_save(layers: list[RandLoraLayer], config: RandLoraConfig, adapter_name: str) -> dict[str, Tensor]:
    """Return the bases of rank ``config.r`` by their names in the file; nothing if they are not to be saved.

    Bases of other ranks (``rank_pattern``) are never written; the fingerprint covers them.
    """
    bound = [layer.bases[adapter_name] for layer in layers if layer.r[adapter_name] == config.r]
    if not config.save_projection or not bound or isinstance(bound[0], AwaitedBasis):
        return {}
    basis = bound[0]
    cut = basis.spec is not None and basis.spec != basis.spec.whole()
    if cut and basis.spec is not None and not config.peft_draws_bases:
        basis, cut = get_basis(basis.spec.whole()), False  # PEFT cannot draw these: it needs them all
    A, B = basis.projections()
    end = USED if cut else ""
    return {f"randlora_A{end}": A, f"randlora_B{end}": B}


def fold_scaling(
    state_dict: dict[str, Tensor], layers: list[RandLoraLayer], config: RandLoraConfig, adapter_name: str
) -> dict[str, Tensor]:
    """Return the state with γ/√n under the paper's scaling, for readers that scale by alpha/r alone."""
    folded_already = any(layer.gamma_factor[adapter_name] != 1 for layer in layers)
    if config.randlora_scaling == "peft" or folded_already:
        return state_dict
    return {
        key: value / math.sqrt(value.shape[-2]) if key.endswith(f".{GAMMA}.{adapter_name}") else value
        for key, value in state_dict.items()
    }


def unfold_scaling(
    state_dict: dict[str, Tensor], layers: list[RandLoraLayer], config: RandLoraConfig, adapter_name: str
) -> dict[str, Tensor]:
    """Return the content of a file with ``fold_scaling`` undone."""
    if config.randlora_scaling == "peft":
        return state_dict
    for layer in layers:
        layer.unfold_gamma(adapter_name)
    return {
        key: value * math.sqrt(value.shape[-2]) if key.endswith(f".{GAMMA}") else value
        for key, value in state_dict.items()
    }


def take_projections(
    state_dict: dict[str, Tensor], model: nn.Module, config: RandLoraConfig, adapter_name: str
) -> dict[str, Tensor]:
    """Remove the bases from a file's content, and bind them to the adapter's layers if they differ from its own.

    Returns:
        The rest of the content.

    Raises:
        CheckpointError: if a basis is incomplete, malformed or too small for its layers.
        BasisMismatchError: if the bases are not those of the config's fingerprint.
    """
    pairs = parts_of(state_dict, config.basis_class).bases
    gone = {name for pair in pairs.values() for name in pair}
    layers = list(adapted(model, adapter_name).values())
    main = [layer for layer in layers if layer.r[adapter_name] == config.r]
    bound = [_bind(state_dict[pair.A], state_dict[pair.B], main, adapter_name, owner) for owner, pair in pairs.items()]
    if any(basis is not bound[0] for basis in bound):
        raise CheckpointError(
            f"the file holds different bases for different layers ({', '.join(sorted(pairs))}); a RandLoRA adapter has "
            "one pair of bases for all layers"
        )
    if config.basis_fingerprint is not None:
        _verify(layers, config.basis_fingerprint, adapter_name)
    elif not pairs and config.read_from_file:
        _warn_of_assumed_bases(config, "the adapter was saved without its bases and without their fingerprint")
    return {name: value for name, value in state_dict.items() if name not in gone}


def warn_of_unread_bases(config: RandLoraConfig) -> None:
    """Warn of a saved adapter whose file is read past PEFT, as ``model.load_adapter`` of Transformers does."""
    if config.read_from_file and config.basis_fingerprint is None:
        _warn_of_assumed_bases(
            config,
            "the adapter was saved without a fingerprint of its bases, and this way of loading does not read those in "
            "its file (`PeftModel.from_pretrained` does)",
        )


def _warn_of_assumed_bases(config: RandLoraConfig, reason: str) -> None:
    warnings.warn(
        f"{reason}; they are drawn from projection_prng_key={config.projection_prng_key} as PEFT draws them on a "
        "machine that supports bfloat16. If the adapter was trained with others, its outputs will be wrong.",
        stacklevel=3,
    )


def _bind(A: Tensor, B: Tensor, layers: list[RandLoraLayer], adapter_name: str, owner: str) -> Basis | AwaitedBasis:
    """Return the bases A (r, 1, m) and B (M, n, r), bound to ``layers``: their own ones if the numbers are the same."""
    if not layers:
        raise CheckpointError(f"the file holds bases for {owner!r}, but no layer of the model uses them")
    current = layers[0].bases[adapter_name]
    if isinstance(current, Basis) and current.same_numbers(A, B):
        return current
    basis = basis_from_projections(A, B)
    for layer in layers:
        if not basis.covers(layer.r[adapter_name], layer.min_dim, layer.max_dim):
            raise CheckpointError(
                f"the file's bases of shapes {tuple(A.shape)} and {tuple(B.shape)} are too small for a "
                f"{layer.out_features}×{layer.in_features} layer of rank {layer.r[adapter_name]}: the adapter was made "
                "for another model or another r"
            )
    for layer in layers:
        layer.bind_basis(adapter_name, basis)
    return basis


def _verify(layers: list[RandLoraLayer], expected: str, adapter_name: str) -> None:
    found = fingerprint(layers, adapter_name)
    if found != expected:
        raise BasisMismatchError(
            f"the bases in the file have fingerprint {found}, the adapter was trained with {expected}: the file is "
            "damaged or belongs to another config. (A program that averages an adapter's tensors averages its bases "
            "too; with save_projection=False they are not among them)"
        )
