"""Adapted ``torch.nn.Linear`` and Transformers' ``Conv1D``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from randlora.ops import linear as ops
from randlora.ops.bases import AwaitedBasis, Basis
from randlora.ops.plan import Plan, Problem, call_cost, choose, sum_cost
from randlora.ops.precision import compute_dtype
from randlora.ops.prepared import Prepared, PreparedCalls
from randlora.tuner.layers.base import AdaptedModule, RandLoraLayer, innermost
from randlora.tuner.layers.mergeable import random_input
from randlora.tuner.layers.weight_cache import HeldUpdate, Term, can_compare, may_hold


class Linear(AdaptedModule, RandLoraLayer):
    """A linear layer with RandLoRA adapters, for x (..., in).

    Args:
        base_layer: the ``nn.Linear`` (weight (out, in)) or ``Conv1D`` (weight (in, out)) to adapt.
        adapter_name: name of the first adapter.
        **adapter: values of the adapter, as of :meth:`RandLoraLayer.update_layer`.
    """

    is_linear = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, **adapter: Any) -> None:
        super().__init__()
        inner = innermost(base_layer)
        in_features, out_features = linear_shape(inner)
        RandLoraLayer.__init__(self, base_layer, in_features, out_features)
        self.fan_in_fan_out = isinstance(inner, Conv1D)
        self._active_adapter = adapter_name
        self._held = HeldUpdate()
        self._prepared = PreparedCalls()
        self.update_layer(adapter_name, **adapter)

    def forward_with(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output as if ``adapters`` were the active ones."""
        names = [name for name in adapters if name in self.r]
        if self._disable_adapters or self.merged_adapters or not names:
            return self.base_layer(x, *args, **kwargs)

        dtype = compute_dtype(x)
        weight = None if args or kwargs else self._takeable_weight(names[0], x, dtype)
        if weight is None:
            result = self._call_base(x, args, kwargs)
        else:
            base: Any = self._modules["base_layer"]
            bias, oriented = base.bias, weight.T if self.fan_in_fan_out else weight
            kept = self._kept_update(names, x, dtype, weight)
            if kept is not None and not torch.is_grad_enabled():
                return ops.with_update(x, oriented, kept, bias)
            result = self._update(names.pop(0), x, dtype, oriented, bias, kept)
        for name in names:
            result = self._add(result, self._update(name, x, dtype))
        return result

    def plan(self, tokens: int, adapter_name: str | None = None, dtype: torch.dtype | None = None) -> Plan:
        """Return the plan by which the layer would compute an adapter's update in a training step of that many tokens.

        Args:
            tokens: rows of the flattened input.
            adapter_name: name of the adapter; by default the first active one.
            dtype: dtype of the products; by default that of the base weight.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        weight = self._base_weight()
        dtype = weight.dtype if dtype is None else dtype
        x = torch.empty(0, self.in_features, dtype=dtype, device=weight.device)
        fusible = self._takeable_weight(name, x, dtype) is not None and ops.fuses(dtype, weight.dtype)
        return choose(self._problem(name, tokens, weight.device, dtype, fusible))

    def train(self, mode: bool = True) -> Linear:
        """Set the mode; training mode releases a held update."""
        if mode:
            self._held.release()
        return super().train(mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight, as :meth:`RandLoraLayer.merge`."""
        self._held.release()
        super().merge(safe_merge, adapter_names)

    def bind_basis(self, adapter_name: str, basis: Basis | AwaitedBasis) -> None:
        """Give the adapter its bases, as :meth:`RandLoraLayer.bind_basis`, and release calls prepared from others."""
        self._prepared.clear()
        super().bind_basis(adapter_name, basis)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and all that is held or prepared for it."""
        self._held.release()
        self._prepared.clear()
        super().delete_adapter(adapter_name)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        self._held.release()  # useless in another dtype or on another device
        self._prepared.clear()
        return super()._apply(fn, recurse)

    def _kept_update(self, names: list[str], x: Tensor, dtype: torch.dtype, weight: Tensor) -> Tensor | None:
        """Return the sum of the adapters' ΔW (out, in), if the layer may and should hold it between calls."""
        training = self.training or torch.is_grad_enabled()
        if not may_hold(training) or _traces() or (training and len(names) > 1):
            return None
        if not all(self.basis(name).repays_holding for name in names):
            return None
        if not ops.can_fuse(dtype, weight.dtype):
            return None
        terms = [self._term(name) for name in names]
        if not all(map(can_compare, terms)):
            return None
        kept = self._held.get(terms, dtype)
        return self._hold(terms, names, x, dtype, training) if kept is None else kept

    def _term(self, name: str) -> Term:
        lam, gamma = self.randlora_lambda[name], self.randlora_gamma[name]
        return Term(self.basis(name), self._scaling(name), lam, gamma)

    def _hold(
        self, terms: list[Term], names: list[str], x: Tensor, dtype: torch.dtype, training: bool
    ) -> Tensor | None:
        """Make ΔW once calls without it have cost as much as making it; return it if the budget has room."""
        tokens = x.numel() // max(x.shape[-1], 1)
        problems = [self._problem(name, tokens, x.device, dtype, fusible=True) for name in names]
        if not self._held.pays(tuple(names), sum(map(call_cost, problems)), sum(map(sum_cost, problems))):
            return None

        def make(copies: Sequence[Term]) -> Tensor:
            total: Tensor | None = None
            for name, term in zip(names, copies, strict=True):
                bases = self._operands(name, x.device, dtype)
                wide = self.out_features < self.in_features
                update = ops.delta_weight(bases, term.lam.to(dtype), term.gamma.to(dtype), term.scaling, wide)
                total = update if total is None else total + update
            return cast("Tensor", total)

        return self._held.make(terms, make, self.out_features * self.in_features * dtype.itemsize, training)

    def _problem(self, name: str, tokens: int, device: torch.device, dtype: torch.dtype, fusible: bool) -> Problem:
        operands = self._operands(name, device, dtype, tokens)
        return ops.problem_of(operands, tokens, self.out_features, self.in_features, fusible)

    def _update(
        self,
        name: str,
        x: Tensor,
        dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        x = self._own_input(name, x)
        x = x if x.dtype == dtype else x.to(dtype)
        lam, gamma = self._scalings(name)
        return ops.prepared_linear(x, self._prepared_call(name, x, weight), lam, gamma, weight, bias, kept)

    def _prepared_call(self, name: str, x: Tensor, weight: Tensor | None) -> Prepared:
        if _traces():  # the number of tokens may be a symbol
            return self._prepare(name, x, weight)
        tokens, basis = x.numel() // (x.shape[-1] or 1), self.bases[name]
        weight_dtype = None if weight is None else weight.dtype
        key = (name, self.scaling[name], x.device, x.dtype, tokens, weight_dtype, x.requires_grad)
        found = self._prepared.get(key, basis)
        return self._prepared.keep(key, self.basis(name), self._prepare(name, x, weight)) if found is None else found

    def _prepare(self, name: str, x: Tensor, weight: Tensor | None) -> Prepared:
        tokens, sizes = x.numel() // max(x.shape[-1], 1), self.sizes(name)
        operands = self.basis(name).scaled_operands(x.device, x.dtype, sizes, tokens, self.scaling[name])
        fusible = weight is not None and ops.fuses(x.dtype, weight.dtype)
        shape = (self.out_features, self.in_features)
        problem = ops.problem_of(operands, tokens, *shape, fusible, x.requires_grad)
        return Prepared(operands, choose(problem), self.out_features)

    def _takeable_weight(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the base weight, if its product may be computed here, together with the update.

        The base layer must be a plain product of the same input with a plain frozen tensor: without another adapter
        inside, a quantised or sharded weight, hooks (such as offloading) or active dropout.
        """
        weight = self._plain_weight(name, x)
        if weight is None or weight.requires_grad:
            return None
        # the base layer raises for a wrong dtype
        return weight if weight.dtype == x.dtype or dtype != x.dtype else None

    def _probe(self, weight: Tensor) -> Tensor:
        return random_input((1, 4, self.in_features), weight)

    def _product(self, x: Tensor, update: Tensor) -> Tensor:
        return x @ (update if self.fan_in_fan_out else update.T)

    def _to_weight_layout(self, update: Tensor) -> Tensor:
        return update.T if self.fan_in_fan_out else update


class OutProjection(Linear):
    """The ``out_proj`` of an ``nn.MultiheadAttention``, with RandLoRA adapters. The attention reads only its weight."""

    computes_rows = False
    read_by_parent = True


def _traces() -> bool:
    """Return whether operations are recorded, so that a held tensor would become a constant."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def linear_shape(base_layer: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer, also with a weight that DeepSpeed has partitioned."""
    if isinstance(base_layer, Conv1D):
        weight = base_layer.weight
        shape = getattr(weight, "ds_shape", weight.shape)
        return shape[0], shape[1]
    return base_layer.in_features, base_layer.out_features  # type: ignore[return-value]
