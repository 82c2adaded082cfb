"""Adapted ``nn.Embedding``, which computes only the rows that are looked up."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from randlora.errors import UnsupportedLayerError
from randlora.ops.precision import without_autocast
from randlora.tuner.layers.base import FLOATING, AdaptedModule, RandLoraLayer, innermost
from randlora.tuner.layers.mergeable import require_exchangeable


class Embedding(AdaptedModule, RandLoraLayer):
    """An embedding (weight (num_embeddings, dim)) with RandLoRA adapters, for indices x (...).

    An embedding is the linear layer of a one-hot input: in = num_embeddings, out = dim. The row of ``padding_idx`` gets
    no update. ``randlora_dropout`` has no effect, since indices cannot be dropped.

    Args:
        base_layer: the embedding to adapt; it may multiply its output by an ``embed_scale``, as Gemma's does.
        adapter_name: name of the first adapter.
        **adapter: values of the adapter, as of :meth:`RandLoraLayer.update_layer`.
    """

    drops_input = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, **adapter: Any) -> None:
        super().__init__()
        inner: Any = innermost(base_layer)
        RandLoraLayer.__init__(self, base_layer, inner.num_embeddings, inner.embedding_dim)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **adapter)

    def forward_with(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output as if ``adapters`` were the active ones."""
        names = [name for name in adapters if name in self.r]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if self._exchanges_weight():
            return self._call_with_sum(names, x, args, kwargs)
        result = self._call_base(x, args, kwargs)
        for name in names:
            result = self._add(result, self._scaled(self._rows(name, x, result.dtype)))
        return result

    def _call_with_sum(self, names: list[str], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the base layer's output with W + ΔW, for a class with an unknown forward."""
        require_exchangeable(self.base_layer, self.parameter_name, self._where())
        weight = self._base_weight()
        with without_autocast(weight.device.type):
            total = sum((self.get_delta_weight(name).to(weight.device) for name in names), start=weight)
        exchanged = {self.parameter_name: total.to(weight.dtype)}
        return cast("Tensor", functional_call(self.base_layer, exchanged, (x, *args), kwargs))

    def _exchanges_weight(self) -> bool:
        """Return whether the class has a forward of its own, which may count positions or take no indices."""
        base: Any = self.base_layer
        if not isinstance(base, nn.Embedding) or hasattr(base, "embed_scale"):
            return False
        own = type(base).forward is not nn.Embedding.forward
        return own and type(base.weight) in (nn.Parameter, Tensor) and base.weight.dtype in FLOATING

    def _scaled(self, rows: Tensor) -> Tensor:
        scale = self._get_embed_scale()
        return rows if scale is None else rows * scale.to(rows.dtype)

    def _probe(self, weight: Tensor) -> Tensor:
        return torch.arange(min(4, len(weight)), device=weight.device).unsqueeze(0)

    def _product(self, x: Tensor, update: Tensor) -> Tensor:
        return self._scaled(F.embedding(x, update))

    def _rows(self, name: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows ``ids`` of ΔW, by the product of all rows if that is less work than one for each index."""
        base: Any = self.get_base_layer()
        operands = self._lookup(name, ids.device, dtype)
        with without_autocast(ids.device.type):
            lam, gamma = self.randlora_lambda[name].to(ids.device), self.randlora_gamma[name].to(ids.device)
            scaled = operands.scaled(lam * (self._scaling(name) / operands.unit), gamma)
            wide = self.out_features < self.in_features
            if base.scale_grad_by_freq or ids.numel() >= base.num_embeddings:
                table = operands.table(scaled, wide)
                rows = F.embedding(ids, table, scale_grad_by_freq=base.scale_grad_by_freq)
            else:
                rows = operands.rows(ids, scaled, wide)
        if base.padding_idx is not None:
            rows = rows.masked_fill((ids == base.padding_idx).unsqueeze(-1), 0)
        return rows

    def _to_weight_layout(self, update: Tensor) -> Tensor:
        padding_idx = getattr(self.get_base_layer(), "padding_idx", None)
        if padding_idx is None:
            return update.T
        rows = torch.arange(self.in_features, device=update.device).unsqueeze(-1)
        return update.T.masked_fill(rows == padding_idx, 0)


def embedding_shape(base_layer: nn.Embedding, name: str) -> tuple[int, int]:
    """Return (in, out) of the embedding as a linear layer.

    Raises:
        UnsupportedLayerError: if the embedding has a ``max_norm``, which torch would apply to W without its update.
    """
    if base_layer.max_norm is not None:
        raise UnsupportedLayerError(
            f"target module {name!r} is an Embedding with max_norm={base_layer.max_norm}: each lookup rewrites its "
            "weight, and would not see the update. Set `max_norm=None` (with rows that are short enough already that "
            "changes nothing), or add the module to `exclude_modules`."
        )
    return base_layer.num_embeddings, base_layer.embedding_dim
