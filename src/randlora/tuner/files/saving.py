"""PEFT's ways of taking an adapter out of a model and of putting one in, past wrappers; files that lack nothing.

What is gathered may be empty: in a distributed run, on all processes but the one that writes. So a lack is an error
only where a file is to be written.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from randlora.errors import CheckpointError
from randlora.tuner.adapters.alone import without_others
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.files.atomic import write_atomically
from randlora.tuner.layers.base import adapted
from randlora.tuner.wrappers import plain_names, plain_view

_writes: ContextVar[bool] = ContextVar("writes", default=False)


def saved_whole(save: Callable[..., None]) -> Callable[..., None]:
    """Return ``PeftModel.save_pretrained``, made to refuse writing a file that lacks λ or γ."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        writes: bool = bound.arguments["is_main_process"]
        ours = any(isinstance(config, RandLoraConfig) for config in model.peft_config.values())
        if writes and ours and not bound.arguments["safe_serialization"]:
            warnings.warn(
                "safe_serialization=False writes adapter_model.bin, a pickle, which loading refuses: nothing is "
                "unpickled from an adapter. Leave it at True to load the adapter again.",
                stacklevel=2,
            )
        token = _writes.set(writes)
        try:
            save(model, *args, **kwargs)
        finally:
            _writes.reset(token)

    return save_pretrained


def written_whole(save_file: Callable[..., None], prefix: str) -> Callable[..., None]:
    """Return PEFT's writer of safetensors files, made atomic for files of RandLoRA adapters."""

    @functools.wraps(save_file)
    def save(tensors: dict[str, Any], filename: str, metadata: dict[str, str] | None = None) -> None:
        if isinstance(tensors, _Elsewhere):
            return
        if any(prefix in key for key in tensors):
            write_atomically(filename, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        else:
            save_file(tensors, filename, metadata=metadata)

    return save


def taken_plain(get_tensors: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return PEFT's collector of tensors to save, given a model without wrappers and without other adapters.

    (It looks for the name of each other adapter in that of each tensor.)
    """
    signature = inspect.signature(get_tensors)

    @functools.wraps(get_tensors)
    def get_peft_model_state_dict(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        view = plain_view(model)
        bound = signature.bind(view, *args, **kwargs)
        bound.apply_defaults()
        given, name = bound.arguments["state_dict"], bound.arguments["adapter_name"]
        if not isinstance(view.peft_config[name], RandLoraConfig):
            return get_tensors(model, *args, **kwargs)
        content = plain_names(view, without_others(view.state_dict() if given is None else given, name))
        if not content and _writes.get() and _is_partitioned(view):
            return _elsewhere(name)
        if _writes.get() or (given is not None and isinstance(view, PreTrainedModel)):  # Transformers' save_pretrained
            _require_whole(view, name, content)
        bound.arguments["state_dict"] = content
        return get_tensors(*bound.args, **bound.kwargs)

    return get_peft_model_state_dict


def put_plain(set_tensors: Callable[..., Any]) -> Callable[..., Any]:
    """Return PEFT's function that puts tensors into an adapter, given a model without wrappers."""

    @functools.wraps(set_tensors)
    def set_peft_model_state_dict(model: Any, peft_model_state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        view = plain_view(model)
        ours = any(isinstance(config, RandLoraConfig) for config in view.peft_config.values())
        if not ours:
            return set_tensors(model, peft_model_state_dict, *args, **kwargs)
        return set_tensors(view, plain_names(view, peft_model_state_dict), *args, **kwargs)

    return set_peft_model_state_dict


class _Elsewhere(dict[str, Any]):
    """The content of a file that is not to be written."""


def _elsewhere(adapter_name: str) -> _Elsewhere:
    """Return no content, with a warning: the tensors are in DeepSpeed's shares, and so in its own checkpoint."""
    warnings.warn(
        f"no weights of the adapter {adapter_name!r} are written: DeepSpeed holds them in shares, and none were "
        "gathered. Its own checkpoint has them; stage3_gather_16bit_weights_on_model_save=True gives a file of them.",
        stacklevel=4,
    )
    return _Elsewhere()


def _is_partitioned(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _require_whole(model: nn.Module, adapter_name: str, content: Mapping[str, Tensor]) -> None:
    """Require that ``content`` of ``model`` holds λ and γ of every layer that has the adapter.

    Raises:
        CheckpointError: naming those that are missing, or have not their shape.
    """
    wanted = {
        f"{path}.{group}.{adapter_name}": shape
        for path, layer in adapted(model, adapter_name).items()
        for group, shape in layer.shapes(adapter_name).items()
    }
    found = {name: tuple(getattr(content.get(name), "shape", ())) for name in wanted}
    lacking = [name for name in wanted if found[name] != wanted[name]]
    if lacking:
        first = lacking[0]
        there = f"has it in shape {found[first]}, not {wanted[first]}" if first in content else "has none"
        raise CheckpointError(
            f"the adapter {adapter_name!r} cannot be saved: the state to save lacks {len(lacking)} of "
            f"{len(wanted)} tensors of λ and γ. Of {first!r} it {there}. Leave `state_dict` out, or hand over the "
            "whole state of this model: gathered, as `accelerator.get_state_dict(model)` gives it, where processes "
            "hold shares. Adapters that it does not hold are left out with `selected_adapters`"
        )
