"""Sums of adapters: which of them are RandLoRA adapters again, and how near the one with the nearest coefficients is.

A sum of adapters with the same bases is a RandLoRA adapter exactly where, basis by basis, its terms share γ (then λ
adds up) or λ (then γ does), up to a factor; so for one adapter always. ``nearest.py`` has the maths.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from randlora.errors import CombinationError
from randlora.ops.bases import Basis
from randlora.tuner.adapters.nearest import EXACT, Fit, fit
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.layers.base import RandLoraLayer, adapted

if TYPE_CHECKING:
    from randlora.tuner.model import RandLoraModel

_REFUSED = (
    "combination_type={kind!r} gives no RandLoRA adapter: {why}. Use 'linear' where the adapters share λ or γ, "
    "'nearest' for the RandLoRA adapter with the nearest coefficients, `randlora.convert.to_lora(model, "
    "{{name: weight, ...}}, ...)` for a LoRA adapter, or merge: `set_scale`, then `merge_adapter([name, ...])`"
)
_WHY = {
    "svd": "a truncated SVD is a LoRA adapter",
    "cat": "its number of bases follows from r and the layer's size, so that none can be added",
    "ties": "choosing entries of the updates leaves nothing of their form",
    "dare": "dropping entries of the updates leaves nothing of their form",
    "magnitude": "pruning the updates leaves nothing of their form",
}


def add_weighted_adapter(
    tuner: RandLoraModel, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> dict[str, float]:
    """Add an adapter that is a weighted sum of others, as :meth:`RandLoraModel.add_weighted_adapter`."""
    weight_of = _weight_of(tuner, adapters, weights, adapter_name, combination_type)
    layers = adapted(tuner.model, *weight_of)
    carried = {name: {a: w for a, w in weight_of.items() if a in layer.r} for name, layer in layers.items()}
    bases = {name: _common_basis(name, layer, list(carried[name])) for name, layer in layers.items()}
    fits = {name: fit(layer, carried[name]) for name, layer in layers.items()}
    if combination_type == "linear":
        _require_exact(fits, list(weight_of))

    config = _combined_config(tuner, layers, list(weight_of))
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
        tuner._cast_adapter_dtype(adapter_name)
        for name, layer in layers.items():
            _bind(layer, adapter_name, bases[name], config)
            _fill(layer, adapter_name, fits[name])
        _combine_modules_to_save(tuner.model, weight_of, adapter_name)
    except Exception:
        tuner.withdraw_adapter(adapter_name)
        raise
    errors = {name: relative_error(layer, carried[name], adapter_name) for name, layer in layers.items()}
    if combination_type == "nearest":
        _report(errors, adapter_name)
    return errors


def _weight_of(
    tuner: RandLoraModel, adapters: list[str], weights: list[float], adapter_name: str, kind: str
) -> dict[str, float]:
    """Return the weights by adapter; the weights of an adapter that is named twice are added."""
    if kind not in ("linear", "nearest"):
        why = next((why for part, why in _WHY.items() if part in kind), "it is unknown")
        raise CombinationError(_REFUSED.format(kind=kind, why=why))
    if not adapters or len(adapters) != len(weights):
        raise CombinationError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
    if adapter_name in tuner.peft_config:
        raise CombinationError(f"there is an adapter {adapter_name!r} already: take another name, or delete it first")
    weight_of: dict[str, float] = {}
    for name, weight in zip(adapters, weights, strict=True):
        config = tuner.peft_config.get(name)
        if config is None:
            known = ", ".join(map(repr, tuner.peft_config))
            raise CombinationError(f"there is no adapter {name!r}; the adapters of the model are {known}")
        for field in ("bias", "trainable_token_indices"):
            if getattr(config, field, None) not in (None, "none"):
                raise CombinationError(
                    f"adapter {name!r} trains more than updates ({field}={getattr(config, field)!r}), which cannot be "
                    "weighted; merge it instead"
                )
        weight_of[name] = weight_of.get(name, 0.0) + weight
    return weight_of


def _common_basis(name: str, layer: RandLoraLayer, adapters: list[str]) -> Basis:
    first, *others = (layer.basis(adapter) for adapter in adapters)
    if not all(other.gives_as(first, layer.sizes(adapters[0])) for other in others):
        described = ", ".join(f"{adapter!r} has r={layer.r[adapter]}" for adapter in adapters)
        raise CombinationError(
            f"the adapters {', '.join(map(repr, adapters))} have different bases in {name!r} ({described}): their sum "
            "is no RandLoRA adapter. They can be added if r, projection_prng_key, the kind of the bases and, unless "
            "that is structured, the largest adapted shape are the same. Otherwise `randlora.convert.to_lora` makes a "
            "LoRA adapter of the sum, and `merge_adapter([name, ...])` adds them to the weights."
        )
    return first


def _require_exact(fits: dict[str, Fit], adapters: list[str]) -> None:
    worst = max(fits, key=lambda name: fits[name].residual)
    if fits[worst].residual > EXACT:
        raise CombinationError(
            f"the sum of {', '.join(map(repr, adapters))} is no RandLoRA adapter: in {worst!r} they share neither λ "
            f"nor γ, and the adapter with the nearest coefficients misses {fits[worst].residual:.1%} of them. Take "
            "combination_type='nearest' to "
            "have it all the same, with its error in each layer; `randlora.convert.to_lora(model, {name: weight, ...}, "
            "...)` for a LoRA adapter of the sum; or merge, which adds any adapters exactly: `set_scale`, then "
            "`merge_adapter([name, ...])`."
        )


def _combined_config(tuner: RandLoraModel, layers: dict[str, RandLoraLayer], adapters: list[str]) -> RandLoraConfig:
    """Return the config of the first adapter, extended to the layers and modules of all of them."""
    configs = [cast("RandLoraConfig", tuner.peft_config[adapter]) for adapter in adapters]
    config = replace(configs[0], basis_fingerprint=None, alpha_pattern={})
    config.read_from_file = False
    config.modules_to_save = sorted({name for c in configs for name in c.modules_to_save or []}) or None
    if any(adapters[0] not in layer.r for layer in layers.values()):
        ranks = {name: next(layer.r[a] for a in adapters if a in layer.r) for name, layer in layers.items()}
        paths = [name for name, layer in layers.items() if not layer.adapts_parameter]
        config.target_modules = "|".join(re.escape(path.replace(".base_layer", "")) for path in paths)
        config.target_parameters = next((c.target_parameters for c in configs if c.target_parameters), None)
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
        config.rank_pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != config.r}
    return config


def _bind(layer: RandLoraLayer, adapter_name: str, basis: Basis, config: RandLoraConfig) -> None:
    """Give the sum the bases of its terms; its file must hold them if its own set of layers does not define them."""
    if layer.basis(adapter_name).gives_as(basis, layer.sizes(adapter_name)):
        return
    if layer.r[adapter_name] != config.r:
        raise CombinationError(
            f"together the adapters define other bases of rank {layer.r[adapter_name]} than each of them, and a file "
            f"holds those of rank r={config.r} only: give them the same target_modules"
        )
    layer.bind_basis(adapter_name, basis)
    config.save_projection = True


@torch.no_grad()
def _fill(layer: RandLoraLayer, adapter_name: str, found: Fit) -> None:
    layer.randlora_lambda[adapter_name].copy_(found.lam / layer.scaling[adapter_name])
    layer.randlora_gamma[adapter_name].copy_(found.gamma)


@torch.no_grad()
def relative_error(layer: RandLoraLayer, weights: dict[str, float], adapter_name: str) -> float:
    """Return the error of the update of ``adapter_name`` against the weighted sum, relative to the sum."""
    total = torch.stack([weight * layer.get_delta_weight(name) for name, weight in weights.items()]).sum(0)
    norm = float(torch.linalg.vector_norm(total))
    missed = float(torch.linalg.vector_norm(layer.get_delta_weight(adapter_name) - total))
    return missed / norm if norm else missed


def _report(errors: dict[str, float], adapter_name: str) -> None:
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    warnings.warn(
        f"adapter {adapter_name!r} is not the sum, but the RandLoRA adapter with the nearest coefficients: its "
        f"updates miss {mean:.1%} on average and {errors[worst]:.1%} in {worst!r}, relative to those of the sum",
        stacklevel=4,
    )


def _combine_modules_to_save(model: nn.Module, weights: dict[str, float], adapter_name: str) -> None:
    """Combine modules that train in full as updates too: W₀ + Σ wᵢ (Wᵢ − W₀)."""
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter_name not in wrapper.modules_to_save:
            continue
        original = dict(wrapper.original_module.named_parameters())
        for name, parameter in wrapper.modules_to_save[adapter_name].named_parameters():
            base = original[name].detach().double()
            total = base.clone()
            for adapter, weight in weights.items():
                if adapter in wrapper.modules_to_save:
                    trained = wrapper.modules_to_save[adapter].get_parameter(name).detach().double()
                    total += weight * (trained - base)
            parameter.data.copy_(total)
