"""Puts this package in the place of PEFT's own RandLora. The one module that writes to PEFT.

PEFT's ``register_peft_method`` refuses a name that is taken, and its enum has no free one, so the entries are written
directly.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import peft.helpers
import peft.peft_model
import peft.utils.hotswap
import peft.utils.save_and_load
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from randlora.tuner.apart import without_others
from randlora.tuner.atomic import write_atomically
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.folder import refuse_pickle
from randlora.tuner.hotswap import hotswap_randlora_too
from randlora.tuner.layers.scaled import ScaledLayer
from randlora.tuner.loading import from_pretrained_or_nothing, load_adapter_or_nothing
from randlora.tuner.model import RandLoraModel


def register() -> None:
    """Makes PEFT use this package for ``PeftType.RANDLORA``; doing it again changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = RandLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = RandLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.RANDLORA] = RandLoraModel.prefix
    helpers: Any = peft.helpers
    if not isinstance(helpers.LoraLayer, tuple):  # the layers whose `scaling` PEFT's `rescale_adapter_scale` changes
        helpers.LoraLayer = (helpers.LoraLayer, ScaledLayer)
    host: Any = peft.peft_model.PeftModel
    if not hasattr(host.load_adapter, "__wrapped__"):
        host.load_adapter = load_adapter_or_nothing(host.load_adapter)
        host.from_pretrained = classmethod(from_pretrained_or_nothing(host.from_pretrained.__func__))
    if not hasattr(peft.utils.hotswap.hotswap_adapter, "__wrapped__"):
        peft.utils.hotswap.hotswap_adapter = hotswap_randlora_too(peft.utils.hotswap.hotswap_adapter)
    files: Any = peft.utils.save_and_load
    if not hasattr(files.torch_load, "__wrapped__"):
        files.torch_load = _refuse_our_pickles(files.torch_load)
    get_tensors = peft.peft_model.get_peft_model_state_dict
    if not hasattr(get_tensors, "__wrapped__"):
        peft.peft_model.get_peft_model_state_dict = _of_one_adapter(get_tensors)
    save_file = peft.peft_model.safe_save_file
    if not hasattr(save_file, "__wrapped__"):
        peft.peft_model.safe_save_file = _save_whole_or_not_at_all(save_file)


def _save_whole_or_not_at_all(save_file: Callable[..., None]) -> Callable[..., None]:
    """PEFT's way of writing a safetensors file, made atomic where the file holds a RandLoRA adapter."""

    @functools.wraps(save_file)
    def save(tensors: dict[str, Any], filename: str, metadata: dict[str, str] | None = None) -> None:
        if any(RandLoraModel.prefix in key for key in tensors):
            write_atomically(filename, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        else:
            save_file(tensors, filename, metadata=metadata)

    return save


def _of_one_adapter(get_tensors: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """PEFT's way of gathering what it saves, which looks for the name of each other adapter in that of each tensor."""
    signature = inspect.signature(get_tensors)

    @functools.wraps(get_tensors)
    def get_peft_model_state_dict(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        given, name = bound.arguments["state_dict"], bound.arguments["adapter_name"]
        if isinstance(model.peft_config[name], RandLoraConfig):
            bound.arguments["state_dict"] = without_others(model.state_dict() if given is None else given, name)
        return get_tensors(*bound.args, **bound.kwargs)

    return get_peft_model_state_dict


def _refuse_our_pickles(load: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's way of reading ``adapter_model.bin``, which it takes where there is no safetensors file."""

    @functools.wraps(load)
    def torch_load(file: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_pickle(file)
        return load(file, *args, **kwargs)

    return torch_load
