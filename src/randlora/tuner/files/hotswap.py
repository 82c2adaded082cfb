"""The numbers of one adapter in the place of another's, in tensors that stay where they are.

So code that holds the tensors, a compiled model first of all, goes on with the new adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from randlora.errors import HotswapError
from randlora.tuner.bases import bind_defined_bases
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.files.adapter_folder import require_loadable
from randlora.tuner.files.format import GAMMA, LAMBDA, in_base
from randlora.tuner.files.key_names import names_in
from randlora.tuner.files.loading import base_put_back_on_failure, named_errors, put_back_on_failure
from randlora.tuner.layers.base import RandLoraLayer, adapted
from randlora.tuner.wrappers import plain_names, plain_view, unwrapped

Layers = dict[str, RandLoraLayer]
"""The adapter's layers by their path in the base model."""

_SAME = ("bias", "randlora_dropout", "modules_to_save", "trainable_token_indices")
"""Values of the config that decide about modules, which a swap leaves as they are."""


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace an adapter by a saved one. Its name and its tensors stay: only their values change.

    Both must have the same layers and ranks. With the same bases and alpha too, a compiled model is not compiled
    again. PEFT's ``peft.utils.hotswap.hotswap_adapter`` calls this for RandLoRA adapters.

    Args:
        model: a model with the adapter, which may be compiled.
        model_name_or_path: folder or hub name of the new adapter.
        adapter_name: the adapter to replace.
        torch_device: where the file is read to; by default PEFT's choice.
        **kwargs: for the hub, such as ``revision`` and ``token``.

    Raises:
        HotswapError: if the new adapter does not fit into the tensors of the old one, or that is merged.
        BasisMismatchError: if the new adapter's bases are not those that it was trained with.
        CheckpointError: if its file is damaged. After any error the model is as it was.
    """
    plain = plain_view(model)
    layers = _layers(plain, adapter_name)
    require_loadable(model_name_or_path, kwargs.get("subfolder"))
    with named_errors(plain, model_name_or_path), base_put_back_on_failure():
        _swap(plain, layers, model_name_or_path, adapter_name, torch_device, kwargs)


def _swap(
    plain: Any, layers: Layers, path: str, adapter_name: str, torch_device: str | None, kwargs: dict[str, Any]
) -> None:
    config = RandLoraConfig.from_pretrained(path, **kwargs)
    content = plain_names(plain, load_peft_weights(path, device=torch_device, **kwargs))
    _require_same_modules(plain.peft_config[adapter_name], config)
    _require_same_tensors(layers, names_in(plain, content, adapter_name), adapter_name)

    with put_back_on_failure(plain, adapter_name), _config_in_place(plain, adapter_name, config):
        for name, layer in layers.items():
            _, scaling = config.rank_and_scaling(name, layer.min_dim)
            layer.scaling[adapter_name] = layer.initial_scaling[adapter_name] = scaling
            layer.gamma_factor[adapter_name] = 1.0
        bind_defined_bases(list(layers.values()), config, adapter_name)
        set_peft_model_state_dict(plain, content, adapter_name)


def hotswap_randlora_too(swap: Callable[..., None]) -> Callable[..., None]:
    """Return PEFT's ``hotswap_adapter``, extended to RandLoRA adapters."""

    @functools.wraps(swap)
    def hotswap(
        model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
    ) -> None:
        config = getattr(unwrapped(model), "peft_config", {}).get(adapter_name)
        chosen = hotswap_adapter if isinstance(config, RandLoraConfig) else swap
        chosen(model, model_name_or_path, adapter_name, torch_device, **kwargs)

    return hotswap


def _layers(model: Any, adapter_name: str) -> Layers:
    base = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "model", model)
    layers = adapted(base, adapter_name)
    if not layers:
        known = {name for layer in adapted(base).values() for name in layer.randlora_lambda}
        raise HotswapError(
            f"the model has no RandLoRA adapter {adapter_name!r} to replace, only {sorted(known)}: load the first one "
            "with `load_adapter`"
        )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise HotswapError(f"the adapter {adapter_name!r} is merged: call `unmerge_adapter()` before replacing it")
    return layers


def _require_same_modules(old: RandLoraConfig, new: RandLoraConfig) -> None:
    for name in _SAME:
        if (getattr(old, name) or None) != (getattr(new, name) or None):
            raise HotswapError(
                f"the new adapter has {name}={getattr(new, name)!r}, the old one {getattr(old, name)!r}: a swap leaves "
                "the modules as they are. Use `load_adapter` under another name, `set_adapter` and `delete_adapter`"
            )


def _require_same_tensors(layers: Layers, content: dict[str, Tensor], adapter_name: str) -> None:
    wanted = {
        f"{path}.{name}": tuple(parameters[adapter_name].shape)
        for path, layer in layers.items()
        for name, parameters in ((LAMBDA, layer.randlora_lambda), (GAMMA, layer.randlora_gamma))
    }
    found = {in_base(key): tuple(value.shape) for key, value in content.items() if key.endswith((LAMBDA, GAMMA))}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise HotswapError(
                f"{name} has the shape {wanted.get(name, 'none')} in the model and {found.get(name, 'none')} in the "
                "new adapter: a swap needs the same layers and the same r. Use `load_adapter` under another name, "
                "`set_adapter` and `delete_adapter`"
            )


@contextmanager
def _config_in_place(model: Any, adapter_name: str, config: RandLoraConfig) -> Iterator[None]:
    old = model.peft_config[adapter_name]
    config.inference_mode = old.inference_mode
    model.peft_config[adapter_name] = config
    try:
        yield
    except Exception:
        model.peft_config[adapter_name] = old
        raise
