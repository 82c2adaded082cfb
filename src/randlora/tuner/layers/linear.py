"""Adapted ``torch.nn.Linear`` and Transformers' ``Conv1D``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from randlora.ops import linear as ops
from randlora.ops.plan import Plan, Problem, call_cost, choose, sum_cost
from randlora.ops.sparse import SparseBases
from randlora.tuner.layers.base import RandLoraLayer, compute_dtype, innermost
from randlora.tuner.layers.held import HeldWeight, may_hold
from randlora.tuner.mixed_batch import calls, mixed_forward


class Linear(nn.Module, RandLoraLayer):
    """A linear layer with RandLoRA adapters.

    Args:
        base_layer: the ``nn.Linear`` (weight (out, in)) or ``Conv1D`` (weight (in, out)) to adapt.
        adapter_name: name of the first adapter.
        **adapter: its values, as of :meth:`RandLoraLayer.update_layer`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **adapter: Any) -> None:
        super().__init__()
        inner = innermost(base_layer)
        in_features, out_features = linear_shape(inner)
        RandLoraLayer.__init__(self, base_layer, in_features, out_features)
        self.fan_in_fan_out = isinstance(inner, Conv1D)
        self._active_adapter = adapter_name
        self._held = HeldWeight()
        self.update_layer(adapter_name, **adapter)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output (..., out) of the base layer plus the updates of the active adapters, for x (..., in)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        mixed = mixed_forward(self, x, *args, **kwargs) if calls.running else None
        return self.forward_with(self.active_adapters, x, *args, **kwargs) if mixed is None else mixed

    def forward_with(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output as if ``adapters`` were the active ones."""
        names = [name for name in adapters if name in self.r]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)

        dtype = compute_dtype(x)
        weight = None if args or kwargs else self._takeable_weight(names[0], x, dtype)
        if weight is None:
            result = self.base_layer(x, *args, **kwargs)
        else:
            bias = cast("Tensor | None", self.base_layer.bias)
            summed = self._summed(names, x, dtype, weight)
            if summed is not None and not torch.is_grad_enabled():
                return F.linear(x, summed, bias)
            oriented = weight.T if self.fan_in_fan_out else weight
            result = self._update(names.pop(0), x, dtype, oriented, bias, summed)
        for name in names:
            result = result + self._update(name, x, dtype).to(result.dtype)
        return result

    def plan(self, tokens: int, adapter_name: str | None = None, dtype: torch.dtype | None = None) -> Plan:
        """How the layer would compute the update of an adapter for a training step of that many tokens.

        Args:
            tokens: rows of the flattened input.
            adapter_name: by default the first active adapter.
            dtype: of the products; by default that of the base weight.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        weight = self._base_weight()
        dtype = weight.dtype if dtype is None else dtype
        x = torch.empty(0, self.in_features, dtype=dtype, device=weight.device)
        fusible = self._takeable_weight(name, x, dtype) is not None and ops.fuses(dtype, weight.dtype)
        return choose(self._problem(name, tokens, weight.device, dtype, fusible))

    def train(self, mode: bool = True) -> Linear:
        """Sets the mode; training lets go of a held weight."""
        if mode:
            self._held.release()
        return super().train(mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates to the base weight, as :meth:`RandLoraLayer.merge`."""
        self._held.release()
        super().merge(safe_merge, adapter_names)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        self._held.release()  # of another device or dtype from now on
        return super()._apply(fn, recurse)

    def _summed(self, names: list[str], x: Tensor, dtype: torch.dtype, weight: Tensor) -> Tensor | None:
        """W plus the updates of the adapters, (out, in), where the layer may and should hold it between calls."""
        training = self.training or torch.is_grad_enabled()
        if not may_hold(training) or torch.compiler.is_compiling() or (training and len(names) > 1):
            return None
        if not ops.can_fuse(dtype, weight.dtype):
            return None
        key = self._sum_key(names, weight)
        if key is None:
            return None
        held = self._held.get(key)
        return self._hold(key, names, x, training) if held is None else held

    def _sum_key(self, names: list[str], weight: Tensor) -> tuple[object, ...] | None:
        """Equal for as long as the sum of W and the adapters' updates is; ``None`` where nothing tells."""
        lam, gamma = self.randlora_lambda, self.randlora_gamma
        parameters: list[Tensor] = [weight]
        key: list[object] = []
        for name in names:
            parameters += (lam[name], gamma[name])
            key += (self.scaling[name], id(self.bases[name]))
        for parameter in parameters:
            if type(parameter) is not nn.Parameter or parameter.is_inference():
                return None
            key += (parameter.data_ptr(), parameter._version)
        return tuple(key)

    def _hold(self, key: tuple[object, ...], names: list[str], x: Tensor, training: bool) -> Tensor | None:
        """The sum, once the calls without it have cost as much as it costs to make, and if the budget has room."""
        weight, tokens = self._base_weight(), x.numel() // max(x.shape[-1], 1)
        problems = [self._problem(name, tokens, x.device, weight.dtype, fusible=True) for name in names]
        if not self._held.pays(key, sum(map(call_cost, problems)), sum(map(sum_cost, problems))):
            return None

        def make() -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                merged = self.merged_weight(names)
            return merged.T if self.fan_in_fan_out else merged

        return self._held.make(key, make, weight.nbytes, training)

    def _problem(self, name: str, tokens: int, device: torch.device, dtype: torch.dtype, fusible: bool) -> Problem:
        bases, shape = self._cheaper_operands(name, tokens, device, dtype), self.randlora_lambda[name].shape
        return ops.problem_of(bases, dtype, tokens, self.out_features, self.in_features, shape, fusible)

    def _cheaper_operands(self, name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> ops.Bases:
        """The bases in the form in which that many tokens cost less."""
        bases = self._operands(name, device, dtype)
        if not isinstance(bases, SparseBases) or ops.skips_zeros(dtype, tokens):
            return bases
        return self._stored(name, device)

    def _update(
        self,
        name: str,
        x: Tensor,
        dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        summed: Tensor | None = None,
    ) -> Tensor:
        return ops.adapted_linear(
            self._own_input(name, x).to(dtype),
            self._cheaper_operands(name, x.numel() // max(x.shape[-1], 1), x.device, dtype),
            self.randlora_lambda[name],
            self.randlora_gamma[name],
            self._scaling(name),
            self.out_features,
            weight,
            bias,
            summed,
        )

    def _takeable_weight(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The base weight, if the product with it may be done here, together with the update.

        Not where the base layer is anything but a plain product with a plain frozen tensor that sees the same input:
        another adapter inside, a quantised or sharded weight, hooks (offloading, for one), active dropout.
        """
        weight = self._plain_weight(name, x) if type(self.base_layer) in (nn.Linear, Conv1D) else None
        if weight is None or weight.requires_grad:
            return None
        # else the base layer says what is wrong
        return weight if weight.dtype == x.dtype or dtype != x.dtype else None

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
