"""The registration of this package in the place of PEFT's own RandLora: the one module that writes to PEFT.

PEFT's ``register_peft_method`` refuses a name that is taken, and its enum has no free one, so the entries are written
directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

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

from randlora.tuner.config import FILE_TYPES, RandLoraConfig
from randlora.tuner.files.adapter_folder import refuse_pickle
from randlora.tuner.files.hotswap import hotswap_randlora_too
from randlora.tuner.files.loading import from_pretrained_or_nothing, load_adapter_or_nothing
from randlora.tuner.files.saving import put_plain, saved_whole, taken_plain, written_whole
from randlora.tuner.layers.scale import ScaledLayer
from randlora.tuner.model import RandLoraModel


def register() -> None:
    """Make PEFT use this package for ``PeftType.RANDLORA``; a second call changes nothing."""
    cast("dict[str, Any]", PEFT_TYPE_TO_CONFIG_MAPPING).update(dict.fromkeys(FILE_TYPES, RandLoraConfig))
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = RandLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.RANDLORA] = RandLoraModel.prefix
    helpers: Any = peft.helpers
    if not isinstance(helpers.LoraLayer, tuple):  # the layers whose `scaling` PEFT's `rescale_adapter_scale` changes
        helpers.LoraLayer = (helpers.LoraLayer, ScaledLayer)
    host: Any = peft.peft_model.PeftModel
    if not hasattr(host.load_adapter, "__wrapped__"):
        host.load_adapter = load_adapter_or_nothing(host.load_adapter)
        host.from_pretrained = classmethod(from_pretrained_or_nothing(host.from_pretrained.__func__))
        host.save_pretrained = saved_whole(host.save_pretrained)
    if not hasattr(peft.utils.hotswap.hotswap_adapter, "__wrapped__"):
        peft.utils.hotswap.hotswap_adapter = hotswap_randlora_too(peft.utils.hotswap.hotswap_adapter)
    files: Any = peft.utils.save_and_load
    if not hasattr(files.torch_load, "__wrapped__"):
        files.torch_load = _refuse_our_pickles(files.torch_load)
    _replace_everywhere("get_peft_model_state_dict", taken_plain)
    _replace_everywhere("set_peft_model_state_dict", put_plain)
    save_file = peft.peft_model.safe_save_file
    if not hasattr(save_file, "__wrapped__"):
        peft.peft_model.safe_save_file = written_whole(save_file, RandLoraModel.prefix)


def _replace_everywhere(name: str, change: Callable[..., Any]) -> None:
    """Change a function of PEFT in all places from which it is called or imported."""
    original = getattr(peft.utils.save_and_load, name)
    if hasattr(original, "__wrapped__"):
        return
    changed = change(original)
    for host in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model):
        setattr(host, name, changed)


def _refuse_our_pickles(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return PEFT's reader of ``adapter_model.bin``, a pickle, made to refuse adapters of this package."""

    @functools.wraps(load)
    def torch_load(file: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_pickle(file)
        return load(file, *args, **kwargs)

    return torch_load
