"""Names in an adapter's file: those of a model in which the adapter is alone.

Other adapters wrap modules too, and PEFT's names count every wrapper: an adapter that was saved beside others could not
be loaded without them.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from randlora.tuner.layers.base import RandLoraLayer


def without_biases_of_others(content: Mapping[str, Tensor], model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return ``content`` without biases of layers that only other adapters adapt; PEFT takes these too."""
    others = _wrappers_of_others(model, adapter_name)
    return {name: value for name, value in content.items() if name.removesuffix(".base_layer.bias") not in others}


def names_alone(content: Mapping[str, Tensor], model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return ``content`` of ``model``, by the names that it would have if ``adapter_name`` were the only adapter."""
    others = _wrappers_of_others(model, adapter_name)
    return {_without(name, others): value for name, value in content.items()}


def names_in(model: nn.Module, content: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Return ``content`` of a file, by the names that ``model`` has for it, whatever other adapters have wrapped."""
    others = _wrappers_of_others(model, adapter_name)
    places = {_without(name, others): name for name, _ in model.named_modules(remove_duplicate=False)}  # innermost last
    renamed = {}
    for name, value in content.items():
        owner, dot, leaf = name.rpartition(".")
        renamed[places.get(owner, owner) + dot + leaf] = value
    return renamed


def _wrappers_of_others(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return the wrappers in which the adapter has no part, by path, each with the name of its inner module."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RandLoraLayer) and adapter_name not in module.randlora_lambda:
            found[path] = "base_layer"
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name not in module._adapters:
            found[path] = "original_module"
    return found


def _without(name: str, wrappers: Mapping[str, str]) -> str:
    """Return the name without the steps from a wrapper to its inner module."""
    kept, path = [], ""
    for part in name.split("."):
        if wrappers.get(path) != part:
            kept.append(part)
        path = f"{path}.{part}" if path else part
    return ".".join(kept)
