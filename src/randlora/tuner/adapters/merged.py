"""The tensors of a model as if its adapters were merged, one at a time and without changing the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from randlora.errors import MergeError
from randlora.tuner.layers.base import RandLoraLayer
from randlora.tuner.wrappers import plain_view


class MergedTensor(NamedTuple):
    """A tensor of the plain model.

    Attributes:
        name: its name there.
        make: gives it; where adapters change it, computed anew.
        held: the tensor of the model that it is made from.
        merged: whether adapters change it.
    """

    name: str
    make: Callable[[], Tensor]
    held: Tensor
    merged: bool


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside PEFT's and all other wrappers, which has the adapted layers."""
    model = plain_view(model)
    if isinstance(model, PeftModel):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model


def merged_tensors(
    model: nn.Module, adapter_names: list[str] | None = None, prefix: str = ""
) -> Iterator[MergedTensor]:
    """Yield the entries of the plain model's ``state_dict()``, in its order.

    Args:
        model: the base model with adapted layers in it.
        adapter_names: the adapters to merge; by default those that are active in each layer.
        prefix: name of ``model`` in the whole, with a dot at the end.

    Raises:
        MergeError: for adapters that are merged already, layers that cannot be merged into
            (:meth:`RandLoraLayer.require_mergeable`), and layers of another method.
    """
    if isinstance(model, RandLoraLayer):
        yield from _of_layer(model, adapter_names, prefix)
    elif isinstance(model, ModulesToSaveWrapper | TrainableTokensWrapper):
        yield from _of_wrapper(model, adapter_names, prefix)
    elif isinstance(model, BaseTunerLayer):
        raise MergeError(f"{prefix.rstrip('.')!r} carries an adapter of another method ({type(model).__name__})")
    else:
        kept = {k: v for k, v in model._buffers.items() if k not in model._non_persistent_buffers_set}
        for name, tensor in (model._parameters | kept).items():
            if tensor is not None:
                yield _as_it_is(prefix + name, tensor)
        for name, child in model.named_children():
            yield from merged_tensors(child, adapter_names, f"{prefix}{name}.")


def _of_layer(layer: RandLoraLayer, adapter_names: list[str] | None, prefix: str) -> Iterator[MergedTensor]:
    if layer.merged:
        raise MergeError(
            f"{', '.join(layer.merged_adapters)} is merged into {prefix.rstrip('.')!r} already: call "
            "`unmerge_adapter()` first"
        )
    wanted = layer.active_adapters if adapter_names is None else adapter_names
    names = [name for name in wanted if name in layer.randlora_lambda]
    if names:
        layer.require_mergeable()
    for inner in merged_tensors(layer.base_layer, adapter_names, prefix):
        if names and inner.name == f"{prefix}{layer.parameter_name}":
            yield inner._replace(make=lambda: layer.merged_weight(names, require_finite=True), merged=True)
        else:
            yield inner


def _of_wrapper(wrapper: Any, adapter_names: list[str] | None, prefix: str) -> Iterator[MergedTensor]:
    wanted = wrapper.active_adapters if adapter_names is None else adapter_names
    names = [name for name in wanted if name in wrapper._adapters]
    if not names:
        yield from merged_tensors(wrapper.original_module, adapter_names, prefix)
    elif isinstance(wrapper, ModulesToSaveWrapper):
        chosen = merged_tensors(wrapper.modules_to_save[names[-1]], adapter_names, prefix)
        yield from (tensor._replace(merged=True) for tensor in chosen)
    else:
        weight = cast("Tensor", wrapper.original_module.weight)
        make = functools.partial(wrapper.token_adapter.get_merged_weights, names)
        yield MergedTensor(f"{prefix}weight", torch.no_grad()(make), weight, True)


def _as_it_is(name: str, tensor: Tensor) -> MergedTensor:
    return MergedTensor(name, tensor.detach, tensor, False)
