"""Scaling an adapter up and down, as PEFT's LoRA and what is built on it (diffusers) do."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer


class ScaledLayer(BaseTunerLayer):
    """A layer whose updates are multiplied by a factor for each adapter.

    Scales belong to the run: an adapter is saved as its config says. A merged weight keeps the scale it was merged
    with.

    Attributes:
        scaling: per adapter the factor of the update.
        initial_scaling: per adapter what the config says of it.
    """

    scaling: dict[str, float]
    initial_scaling: dict[str, float]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scales an adapter by ``scale``, counted from its config; a layer without the adapter stays as it is."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of all active adapters."""
        for name in self._scaled_adapters():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of all active adapters by ``scale``; without it, they are scaled as their configs say."""
        for name in self._scaled_adapters():
            self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale

    def _scaled_adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]
