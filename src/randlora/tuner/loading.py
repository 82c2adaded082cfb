"""Loads that fail leave the model as it was.

PEFT first puts a new adapter into the model and then reads its file; where the file is refused, it leaves the adapter
there, untrained; and where one of its tensors is refused, those before it are in place already.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from randlora.tuner.layers.base import RandLoraLayer
from randlora.tuner.withdraw import withdraw_adapter


@contextmanager
def taken_back_on_failure(model: nn.Module) -> Iterator[None]:
    """Takes back the RandLoRA adapters that ``model`` has been given within the context, if it ends with an error."""
    before, had_config = _adapters(model), hasattr(model, "peft_config")
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except Exception:
        for name in _adapters(model) - before:
            withdraw_adapter(model, name)
            getattr(model, "peft_config", {}).pop(name, None)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
        if not had_config and not getattr(model, "peft_config", True):
            del model.peft_config
        raise


@contextmanager
def put_back_on_failure(model: nn.Module, adapter: str) -> Iterator[None]:
    """Gives ``adapter``, which ``model`` has, its values and bases back if the context ends with an error."""
    values = [(p, p.detach().clone()) for name, p in model.named_parameters() if adapter in name.split(".")]
    layers = [m for m in model.modules() if isinstance(m, RandLoraLayer) and adapter in m.bases]
    bases = [layer.bases[adapter] for layer in layers]
    numbers = [(held, held[adapter]) for x in layers for held in (x.scaling, x.initial_scaling, x.gamma_factor)]
    try:
        yield
    except Exception:
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        for layer, basis in zip(layers, bases, strict=True):
            layer.bind_basis(adapter, basis)
        for held, number in numbers:
            held[adapter] = number
        raise


def from_pretrained_or_nothing(load: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftModel.from_pretrained``, the function of the class method, made so."""

    @functools.wraps(load)
    def from_pretrained(cls: type, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with taken_back_on_failure(model):
            return load(cls, model, *args, **kwargs)

    return from_pretrained


def load_adapter_or_nothing(load: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftModel.load_adapter``, made so."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        adapter = signature.bind(model, *args, **kwargs).arguments["adapter_name"]
        with ExitStack() as undo:
            undo.enter_context(taken_back_on_failure(model))
            if adapter in _adapters(model):
                undo.enter_context(put_back_on_failure(model, adapter))
            return load(model, *args, **kwargs)

    return load_adapter


def _adapters(model: nn.Module) -> set[str]:
    return {name for m in model.modules() if isinstance(m, RandLoraLayer) for name in m._all_available_adapter_names()}
