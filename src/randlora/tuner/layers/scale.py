"""Scaling an adapter up and down, as PEFT's LoRA and its users (diffusers) do."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer


class ScaledLayer(BaseTunerLayer):
    """A layer whose updates are multiplied by a factor for each adapter.

    Scales are not saved: an adapter is saved with the scaling of its config. A merged weight keeps the scale with which
    it was merged.

    Attributes:
        scaling: per adapter the factor of the update.
        initial_scaling: per adapter the scaling of its config.
    """

    scaling: dict[str, float]
    initial_scaling: dict[str, float]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter by ``scale``, relative to its config; a layer without the adapter does not change."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters by ``scale``."""
        for name in self._scaled_adapters():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters by ``scale``; by default restore the scales of their configs."""
        for name in self._scaled_adapters():
            self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale

    def _scaled_adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]
