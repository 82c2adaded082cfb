"""Adapted linear layers whose weight torch reads past their forward."""

from __future__ import annotations

from torch import Tensor, nn

from randlora.tuner.layers.linear import Linear


class EncoderLinear(Linear):
    """``linear1`` or ``linear2`` of an ``nn.TransformerEncoderLayer`` with RandLoRA adapters.

    It is called, except in evaluation without gradients: then torch's fast path reads its weight, which is W + ΔW.
    """

    @property
    def weight(self) -> Tensor:
        """See :meth:`RandLoraLayer.adapted_weight`."""
        return self.adapted_weight()


class OutProjection(EncoderLinear):
    """The ``out_proj`` of an ``nn.MultiheadAttention`` with RandLoRA adapters, which is read and never called."""

    computes_rows = False


def is_read_by_its_parent(model: nn.Module, name: str) -> bool:
    """Whether the linear layer of that name is part of an ``nn.TransformerEncoderLayer``."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer)
