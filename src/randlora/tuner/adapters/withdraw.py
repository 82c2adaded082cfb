"""Taking an adapter back, as if it had never been added."""

from __future__ import annotations

import warnings

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from randlora.tuner.layers.base import RandLoraLayer
from randlora.tuner.wrappers import put


def withdraw_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove the adapter from all layers and modules of ``model``; unwrap those that it alone has adapted.

    What was added by an injection that has failed half-way is removed too.
    """
    for name, module in reversed(list(model.named_modules())):  # inner modules first
        if isinstance(module, RandLoraLayer):
            if adapter_name in module._all_available_adapter_names():
                _delete_quietly(module, adapter_name)
            inner = None if module.r else module.base_layer  # `alone` may hide other adapters' parameters
        elif isinstance(module, AuxiliaryTrainingWrapper):
            if adapter_name in module._adapters:
                _delete_copy(module, adapter_name)
            inner = None if module._adapters else module.original_module
        else:
            continue
        if inner is not None:
            parent, _, child = name.rpartition(".")
            put(model.get_submodule(parent), child, inner)


def delete_copies(model: nn.Module, adapter_name: str) -> None:
    """Delete the adapter's copies of modules that it trains in full.

    PEFT names all active adapters to such a module and fails where they are several, half-way through a deletion.
    """
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            _delete_copy(module, adapter_name)


def _delete_copy(module: AuxiliaryTrainingWrapper, adapter_name: str) -> None:
    active = [name for name in module.active_adapters if name != adapter_name]
    module.delete_adapter(adapter_name, active or None)


def _delete_quietly(layer: RandLoraLayer, adapter_name: str) -> None:
    """Delete the adapter without PEFT's warning that another becomes active: none is meant to."""
    active = [name for name in layer.active_adapters if name != adapter_name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.delete_adapter(adapter_name)
    layer._active_adapter = active
