"""Making adapters of a model the active ones."""

from __future__ import annotations

import warnings

from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.other import _set_adapter as set_adapter_of_wrapper
from torch import nn

from randlora.tuner.layers.base import RandLoraLayer


def switch(model: nn.Module, adapter_names: str | list[str], inference_mode: bool = False) -> None:
    """Make adapters the active ones in all layers and modules of ``model``; no others train.

    As PEFT does it, which looks through the modules twice and takes twice as long.

    Args:
        model: the adapted model.
        adapter_names: one name, or several.
        inference_mode: let none train.

    Raises:
        ValueError: for several adapters that train the same module in full, or for none where adapters train one so;
            the model is as it was.
    """
    layers, wrappers = _layers_and_wrappers(model)
    for wrapper in wrappers:
        wrapper.check_set_adapter(adapter_names)
    for wrapper in wrappers:
        set_adapter_of_wrapper(wrapper, adapter_names, inference_mode=inference_mode)
    for layer in layers:
        if layer.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            layer.unmerge()
        layer.set_adapter(adapter_names, inference_mode=inference_mode)


def _layers_and_wrappers(model: nn.Module) -> tuple[list[RandLoraLayer], list[AuxiliaryTrainingWrapper]]:
    layers: list[RandLoraLayer] = []
    wrappers: list[AuxiliaryTrainingWrapper] = []
    seen, found = {model}, [model]
    for module in found:  # it grows meanwhile; `Module.modules` takes longer, for names that nobody wants
        if isinstance(module, RandLoraLayer):
            layers.append(module)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrappers.append(module)
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return layers, wrappers
