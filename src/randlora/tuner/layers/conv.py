"""Adapted convolutions: the weight (out, in/groups, *kernel) seen as a matrix (out, in/groups·∏kernel)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import UnsupportedLayerError
from randlora.ops import linear as ops
from randlora.ops.precision import compute_dtype, without_autocast
from randlora.tuner.layers.base import AdaptedModule, RandLoraLayer, innermost
from randlora.tuner.layers.mergeable import random_input
from randlora.tuner.layers.plain import has_plain_convolution

ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d


class _Conv(AdaptedModule, RandLoraLayer):
    """A convolution with RandLoRA adapters.

    The layer computes conv(x, W + ΔW) in one convolution where W is float32 or wider, else conv(x, W) + conv(x, ΔW).
    Stride, padding, padding mode, dilation and groups are those of the base layer.

    Args:
        base_layer: the convolution to adapt.
        adapter_name: name of the first adapter.
        **adapter: values of the adapter, as of :meth:`RandLoraLayer.update_layer`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **adapter: Any) -> None:
        super().__init__()
        RandLoraLayer.__init__(self, base_layer, *conv_shape(innermost(base_layer)))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **adapter)

    def forward_with(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output as if ``adapters`` were the active ones."""
        names = [name for name in adapters if name in self.r]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)

        base: Any = self.get_base_layer()
        if not (args or kwargs) and self._can_take_weight(names[0], x):
            weight = base.weight + self._update(names.pop(0), base.weight.dtype)
            result = base._conv_forward(x, weight, base.bias)
        else:
            result = self._call_base(x, args, kwargs)
        for name in names:
            dtype = compute_dtype(x)
            dropped = self._own_input(name, x).to(dtype)
            result = self._add(result, self._product(dropped, self._update(name, dtype)))
        return result

    def _product(self, x: Tensor, update: Tensor) -> Tensor:
        """Return the part of the output that an update, in the layout of the weight, adds: its own convolution.

        Raises:
            UnsupportedLayerError: if the base layer has its own ``_conv_forward``, which is not linear in the weight.
        """
        base: Any = self.get_base_layer()
        result: Tensor = base._conv_forward(x, update, None)
        if not has_plain_convolution(base):
            twice = base._conv_forward(x, 2 * update, None)
            if not torch.allclose(twice, 2 * result, rtol=1e-3, atol=1e-3 * float(result.detach().abs().max())):
                raise UnsupportedLayerError(
                    f"{self._where()} has a `_conv_forward` of its own, which is not a convolution with the weight "
                    f"that it is given, so that an update has none: add {self.path or 'the module'!r} to "
                    "`exclude_modules`"
                )
        return result

    def _probe(self, weight: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        reach = zip(base.dilation, base.kernel_size, base.stride, strict=True)
        size = [dilation * (kernel - 1) + 2 * stride + 1 for dilation, kernel, stride in reach]
        return random_input((1, base.in_channels, *size), weight)

    def _update(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return ΔW in the layout of the weight, differentiable in λ and γ, summed in float32 or wider."""
        with without_autocast(self.randlora_lambda[name].device.type):
            return self.get_delta_weight(name).to(dtype)

    def _can_take_weight(self, name: str, x: Tensor) -> bool:
        """Return whether one convolution may use W + ΔW: see :meth:`RandLoraLayer._plain_weight`, ``ops.can_fuse``."""
        return self._plain_weight(name, x) is not None and ops.can_fuse(compute_dtype(x), self._base_weight().dtype)

    def _to_weight_layout(self, update: Tensor) -> Tensor:
        base: Any = self.get_base_layer()  # reading `weight.shape` might compute the weight
        return update.reshape(base.out_channels, base.in_channels // base.groups, *base.kernel_size)


class Conv1d(_Conv):
    """An ``nn.Conv1d`` with RandLoRA adapters, for x ([batch,] in, length)."""


class Conv2d(_Conv):
    """An ``nn.Conv2d`` with RandLoRA adapters, for x ([batch,] in, height, width)."""


class Conv3d(_Conv):
    """An ``nn.Conv3d`` with RandLoRA adapters, for x ([batch,] in, depth, height, width)."""


def conv_class(base_layer: ConvNd) -> type[_Conv]:
    """Return the class for a convolution of that number of dimensions."""
    return {1: Conv1d, 2: Conv2d, 3: Conv3d}[len(base_layer.kernel_size)]


def conv_shape(base_layer: Any) -> tuple[int, int]:
    """Return (in, out) of the weight as a matrix: in/groups·∏kernel and the output channels."""
    kernel = torch.Size(base_layer.kernel_size).numel()
    return base_layer.in_channels // base_layer.groups * kernel, base_layer.out_channels
