"""The adapted output projection of ``nn.MultiheadAttention``, whose weight is read and which is never called."""

from __future__ import annotations

from torch import Tensor

from randlora.tuner.layers.linear import Linear


class OutProjection(Linear):
    """The ``out_proj`` of an ``nn.MultiheadAttention`` with RandLoRA adapters: its weight is W + ΔW when it is read."""

    computes_rows = False

    @property
    def weight(self) -> Tensor:
        """See :meth:`RandLoraLayer.adapted_weight`."""
        return self.adapted_weight()
