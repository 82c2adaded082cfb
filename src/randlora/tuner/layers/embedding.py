"""Adapted ``nn.Embedding``: only the rows that are looked up are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from randlora.errors import UnsupportedLayerError
from randlora.ops.units import unit
from randlora.tuner.layers.base import RandLoraLayer, innermost, without_autocast
from randlora.tuner.mixed_batch import calls, mixed_forward


class Embedding(nn.Module, RandLoraLayer):
    """An embedding (weight (num_embeddings, dim)) with RandLoRA adapters.

    It is the linear layer of a one-hot input: in = num_embeddings, out = dim. The row of ``padding_idx`` gets no
    update. ``randlora_dropout`` does nothing here, because indices cannot be dropped.

    Args:
        base_layer: the embedding to adapt; one that multiplies its output with ``embed_scale`` too, as Gemma's does.
        adapter_name: name of the first adapter.
        **adapter: its values, as of :meth:`RandLoraLayer.update_layer`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **adapter: Any) -> None:
        super().__init__()
        inner: Any = innermost(base_layer)
        RandLoraLayer.__init__(self, base_layer, inner.num_embeddings, inner.embedding_dim)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **adapter)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rows (..., dim) of the base layer plus those of the active adapters, for indices x (...)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        mixed = mixed_forward(self, x, *args, **kwargs) if calls.running else None
        return self.forward_with(self.active_adapters, x, *args, **kwargs) if mixed is None else mixed

    def forward_with(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output as if ``adapters`` were the active ones."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        scale = self._get_embed_scale()
        for name in adapters:
            if name in self.r:
                rows = self._rows(name, x, result.dtype)
                result = result + (rows if scale is None else rows * scale.to(rows.dtype))
        return result

    def _rows(self, name: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` of ΔW, through the product of all rows where that is less work than one for each index."""
        base: Any = self.get_base_layer()
        bases = self._stored(name, ids.device)
        with without_autocast(ids.device):
            lam, gamma = self.randlora_lambda[name].to(ids.device), self.randlora_gamma[name].to(ids.device)
            At = bases.scaled(lam * (self._scaling(name) / unit(dtype)), gamma, dtype)
            wide = self.out_features < self.in_features
            if base.scale_grad_by_freq or ids.numel() >= base.num_embeddings:
                B = bases.matrix(dtype)
                table = B @ At if wide else At.T @ B.T
                rows = F.embedding(ids, table, scale_grad_by_freq=base.scale_grad_by_freq)
            elif wide:
                rows = bases.rows(ids, dtype) @ At
            else:
                rows = F.embedding(ids, At.T) @ bases.matrix(dtype).T
        if base.padding_idx is not None:
            rows = rows.masked_fill((ids == base.padding_idx).unsqueeze(-1), 0)
        return rows

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts matrices of linear layers only."""
        return False

    def _to_weight_layout(self, update: Tensor) -> Tensor:
        padding_idx = getattr(self.get_base_layer(), "padding_idx", None)
        if padding_idx is None:
            return update.T
        rows = torch.arange(self.in_features, device=update.device).unsqueeze(-1)
        return update.T.masked_fill(rows == padding_idx, 0)

    def __repr__(self) -> str:
        return "randlora." + super().__repr__()


def embedding_shape(base_layer: nn.Embedding, name: str) -> tuple[int, int]:
    """(in, out) of the embedding as a linear layer.

    Raises:
        UnsupportedLayerError: if it has a ``max_norm``, which would be applied to W without its update.
    """
    if base_layer.max_norm is not None:
        raise UnsupportedLayerError(
            f"target module {name!r} is an Embedding with max_norm={base_layer.max_norm}: each lookup rewrites its "
            "weight, and would not see the update. Set `max_norm=None` (with rows that are short enough already that "
            "changes nothing), or add the module to `exclude_modules`."
        )
    return base_layer.num_embeddings, base_layer.embedding_dim
