"""The names that an adapter may have: those that tell its tensors from the rest of the model."""

from __future__ import annotations

import os

from torch import nn

from randlora.errors import ConfigError
from randlora.tuner.layers.base import adapted
from randlora.tuner.layers.rows import BASE

_AROUND = ("base_model", "model", "base_layer", "modules_to_save", "original_module", "token_adapter")
"""Modules that PEFT puts around those of a base model."""


def require_usable_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that an adapter of ``model`` cannot have, before it is added.

    Raises:
        ConfigError: naming the fault.
    """
    if adapted(model, adapter_name):
        return
    fault = _fault(adapter_name) or _clash(model, adapter_name)
    if fault:
        raise ConfigError(f"adapter_name={adapter_name!r:.80} {fault}: choose another, such as 'my_adapter'")


def _fault(name: str) -> str | None:
    if not isinstance(name, str) or not name:
        return "must be a string that is not empty"
    if "." in name:
        return "holds a dot, which separates the names of modules"
    if os.path.isabs(name):
        return "is an absolute path: saving would write there, and not into the folder that it is given"
    if name == BASE:
        return "stands for no adapter in a batch of several"
    if any(hasattr(holder, name) for holder in (nn.ParameterDict(), nn.ModuleDict())):
        return "is the name of an attribute of torch's modules"
    return None


def _clash(model: nn.Module, name: str) -> str | None:
    """Return a clash with names in the model: tensors with this name in theirs PEFT would save for no other adapter."""
    paths = [path for path, _ in model.named_modules()]
    paths += [path for path, _ in model.named_parameters()] + [path for path, _ in model.named_buffers()]
    if name in _AROUND or name.startswith("randlora_"):
        return "is the name of a module that adaptation adds"
    place = next((path for path in paths if name in path.split(".")), None)
    return place and f"is part of the name of {place!r}, which files of other adapters would then lack"
