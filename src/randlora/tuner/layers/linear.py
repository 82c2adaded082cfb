"""Adapted ``torch.nn.Linear`` and Transformers' ``Conv1D``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from randlora.ops import linear as ops
from randlora.tuner.layers.base import RandLoraLayer, compute_dtype
from randlora.tuner.mixed_batch import mixed_forward

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Linear(nn.Module, RandLoraLayer):
    """A linear layer with RandLoRA adapters.

    Args:
        base_layer: the ``nn.Linear`` (weight (out, in)) or ``Conv1D`` (weight (in, out)) to adapt.
        adapter_name: name of the first adapter.
        **adapter: its values, as of :meth:`RandLoraLayer.update_layer`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **adapter: Any) -> None:
        super().__init__()
        inner: Any = base_layer
        while hasattr(inner, "base_layer"):
            inner = inner.base_layer
        in_features, out_features = linear_shape(inner)
        RandLoraLayer.__init__(self, base_layer, in_features, out_features)
        self.fan_in_fan_out = isinstance(inner, Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **adapter)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output (..., out) of the base layer plus the updates of the active adapters, for x (..., in)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if "adapter_names" in kwargs:
            return mixed_forward(self, kwargs.pop("adapter_names"), x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.randlora_lambda]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)

        dtype = compute_dtype(x)
        if args or kwargs or not self._can_take_weight(names[0], x, dtype):
            result = self.base_layer(x, *args, **kwargs)
        else:
            weight = self._base_weight()
            oriented = weight.T if self.fan_in_fan_out else weight
            bias = cast("Tensor | None", self.base_layer.bias)
            result = self._update(names.pop(0), x, dtype, oriented, bias)
        for name in names:
            result = result + self._update(name, x, dtype).to(result.dtype)
        return result

    def _update(
        self,
        name: str,
        x: Tensor,
        dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        A, B = self._sliced_bases(name, x.device, dtype)
        return ops.adapted_linear(
            self.randlora_dropout[name](x).to(dtype),
            A,
            B,
            self.randlora_lambda[name],
            self.randlora_gamma[name],
            self.scaling[name],
            self.out_features,
            weight,
            bias,
        )

    def _can_take_weight(self, name: str, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether the product with the base weight may be done here, together with the update.

        Not where the base layer is anything but a plain product with a plain frozen tensor that sees the same input:
        another adapter inside, a quantised or sharded weight, hooks (offloading, for one), active dropout.
        """
        base = self.base_layer
        if type(base) not in (nn.Linear, Conv1D) or hasattr(base, "_hf_hook"):
            return False
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return False
        dropout = self.randlora_dropout[name]
        if self.training and isinstance(dropout, nn.Dropout):
            return False
        weight = base.weight
        plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in _FLOATING
        same_dtype = weight.dtype == x.dtype or dtype != x.dtype  # else the base layer says what is wrong
        return plain and same_dtype and not weight.requires_grad and weight.device == x.device

    def __repr__(self) -> str:
        return "randlora." + super().__repr__()

    def _to_weight_layout(self, update: Tensor) -> Tensor:
        return update.T if self.fan_in_fan_out else update


def linear_shape(base_layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer; also where DeepSpeed has taken its weight apart."""
    if isinstance(base_layer, Conv1D):
        weight = base_layer.weight
        shape = getattr(weight, "ds_shape", weight.shape)
        return shape[0], shape[1]
    return base_layer.in_features, base_layer.out_features  # type: ignore[return-value]
