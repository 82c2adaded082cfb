"""The choice of the kind of adapted layer for a module."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from randlora.errors import UnsupportedLayerError
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.layers.base import innermost
from randlora.tuner.layers.conv import conv_class, conv_shape
from randlora.tuner.layers.embedding import Embedding, embedding_shape
from randlora.tuner.layers.linear import Linear, OutProjection, linear_shape
from randlora.tuner.layers.parameter import ParamWrapper, stacked_shape
from randlora.tuner.layers.quantized import quantization_backend, quantized_class
from randlora.tuner.wrappers import unwrapped


class Kind(NamedTuple):
    """The way to adapt a module.

    Attributes:
        create: constructor of the adapted layer, from the module, the adapter's name and its values
            (:meth:`RandLoraLayer.update_layer`).
        shape: (in, out) of the module's weight as a matrix.
    """

    create: Callable[..., nn.Module]
    shape: tuple[int, int]


def kind_of(
    target: nn.Module, name: str, model: nn.Module, config: RandLoraConfig, parameter_name: str | None = None
) -> Kind:
    """Return the kind of adapted layer for a module.

    Args:
        target: the module to adapt, possibly adapted already.
        name: name of the module in ``model``, for messages.
        model: the model with the module.
        config: the adapter's config.
        parameter_name: the targeted parameter of the module; ``None`` if the module itself is targeted.

    Raises:
        UnsupportedLayerError: if no kind fits.
    """
    base_layer = unwrapped(innermost(target))
    if parameter_name is not None:
        create = functools.partial(ParamWrapper, parameter_name=parameter_name)
        return Kind(create, stacked_shape(base_layer, parameter_name, name)[1:])
    backend = quantization_backend(base_layer, model)
    if backend is not None:
        return Kind(functools.partial(quantized_class(backend), backend=backend), linear_shape(base_layer))
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):
        _require_no_dropout(name, config)
        return Kind(OutProjection, linear_shape(base_layer))
    if isinstance(base_layer, nn.MultiheadAttention):
        raise UnsupportedLayerError(
            f"target module {name!r} is a MultiheadAttention, which holds its query, key and value projections in one "
            f"parameter. Adapt that with `target_parameters=[{name + '.in_proj_weight'!r}]`, and its output projection "
            f"with `target_modules=[{name + '.out_proj'!r}]`."
        )
    if isinstance(base_layer, nn.Linear | Conv1D):
        if config.fan_in_fan_out and isinstance(base_layer, nn.Linear):
            warnings.warn(
                f"fan_in_fan_out=True has no effect on {name!r}: a `torch.nn.Linear` stores its weight as (out, in).",
                stacklevel=2,
            )
        return Kind(Linear, linear_shape(base_layer))
    if isinstance(base_layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Kind(conv_class(base_layer), conv_shape(base_layer))
    if isinstance(base_layer, nn.Embedding):
        return Kind(Embedding, embedding_shape(base_layer, name))
    raise UnsupportedLayerError(
        f"target module {name!r} is a {type(base_layer).__name__}, which RandLoRA cannot adapt; supported are "
        "`torch.nn.Linear`, `Conv1d`, `Conv2d`, `Conv3d` and `Embedding`, Transformers' `Conv1D` and quantised linear "
        f"layers. {_ways_out(base_layer, name)}Name other modules in `target_modules`, or add this one to "
        "`exclude_modules`."
    )


def _ways_out(module: nn.Module, name: str) -> str:
    """Return sentences on the layers and own parameters of an unsupported module that can be adapted."""
    leaf = name.rpartition(".")[2]
    layers = [
        f"{leaf}.{path}"
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding)
    ]
    parameters = [
        f"{leaf}.{path}"
        for path, parameter in module.named_parameters(recurse=False)
        if parameter.ndim in (2, 3) and parameter.is_floating_point()
    ]
    ways = {"target_modules": layers, "target_parameters": parameters}
    return "".join(
        f"What is inside of it can be adapted with `{field}={names[:4]}`. " for field, names in ways.items() if names
    )


def _require_no_dropout(name: str, config: RandLoraConfig) -> None:
    if config.randlora_dropout:
        raise UnsupportedLayerError(
            f"target module {name!r} is the output projection of a MultiheadAttention, which reads its weight and "
            f"never calls it, so that randlora_dropout={config.randlora_dropout} cannot be applied: set it to 0."
        )
