"""Checks that a layer runs the forward of its kind, so that its product may be computed in its place.

A forward may be replaced in one layer (diffusers' and Accelerate's hooks), in a class or in all of torch, before
randlora is imported or after. Such a layer has to be called.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers.pytorch_utils import Conv1D

_Product = tuple[Any, str, Any]  # place where a forward looks it up, name, and the function there unless replaced

_PRODUCTS: dict[type[nn.Module], _Product] = {
    kind: (place, name, getattr(place, name))
    for kind, place, name in (
        (nn.Linear, F, "linear"),
        (Conv1D, torch, "addmm"),
        (nn.Conv1d, F, "conv1d"),
        (nn.Conv2d, F, "conv2d"),
        (nn.Conv3d, F, "conv3d"),
    )
    if isinstance(getattr(place, name), types.BuiltinFunctionType)
}


def _written_with(owner: type[nn.Module], method: Any) -> bool:
    """Return whether a method is from the module of its class; a replacement has another module's globals."""
    return isinstance(method, types.FunctionType) and method.__globals__ is vars(sys.modules[owner.__module__])


_KINDS: tuple[type[nn.Module], ...] = (*_PRODUCTS, nn.Embedding)
_FORWARDS: frozenset[Callable[..., Any]] = frozenset(
    kind.forward for kind in _KINDS if _written_with(kind, kind.forward)
)
_CONV_FORWARDS: frozenset[Callable[..., Any] | None] = frozenset(
    [kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if _written_with(kind, kind._conv_forward)]
    + [None]
)
_CALL = nn.Module.__call__ if _written_with(nn.Module, nn.Module.__call__) else None
_CALL_IMPL = nn.Module._call_impl if _written_with(nn.Module, nn.Module._call_impl) else None


def is_plain(layer: nn.Module) -> bool:
    """Return whether a call of the layer runs only the forward of torch or Transformers for its kind."""
    held, kind = layer.__dict__, type(layer)
    if "_hf_hook" in held or "_call_impl" in held or ("forward" in held and not _is_bound(held["forward"], layer)):
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if kind.forward not in _FORWARDS or kind.__call__ is not _CALL or kind._call_impl is not _CALL_IMPL:
        return False
    return not (torch_module._has_any_global_hook() or (torch._C._len_torch_function_stack() and _has_function_mode()))


def is_only_moved(layer: nn.Module) -> bool:
    """Return whether the layer is plain except that Accelerate moves its weight or input."""
    held, kind = layer.__dict__, type(layer)
    old = held.get("_old_forward")
    moved = type(held.get("_hf_hook")) in (AlignDevicesHook, CpuOffload)
    return moved and _is_bound(old, layer) and kind.forward in _FORWARDS


def has_plain_product(layer: nn.Module) -> bool:
    """Return whether the forward of a linear layer or convolution, not of a subclass, uses torch's product."""
    product = _PRODUCTS.get(type(layer))
    if product is None or getattr(product[0], product[1]) is not product[2]:
        return False
    return product[0] is not F or product[1] == "linear" or has_plain_convolution(layer)


def has_plain_convolution(layer: nn.Module) -> bool:
    """Return whether the layer's ``_conv_forward``, if any, is torch's own."""
    return "_conv_forward" not in layer.__dict__ and getattr(type(layer), "_conv_forward", None) in _CONV_FORWARDS


def _has_function_mode() -> bool:
    """Return whether a mode other than a default device watches or changes calls of torch."""
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _is_bound(forward: Any, layer: nn.Module) -> bool:
    """Return whether ``forward`` is the class's own, bound to the layer, as after Accelerate removes a hook."""
    return getattr(forward, "__func__", None) is type(layer).forward and forward.__self__ is layer
