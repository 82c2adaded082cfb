"""The layers that an adapter would adapt, and their shapes: nothing is drawn, nothing can be computed."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import Tensor, nn

from randlora.errors import ConfigError
from randlora.ops.bases import Basis
from randlora.tuner.base_model import base_path_of, empty_base, task_of
from randlora.tuner.bases import define_bases
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.files.adapter_folder import AdapterFolder
from randlora.tuner.layers.base import RandLoraLayer, adapted
from randlora.tuner.model import RandLoraModel


class _Unbound(RandLoraModel):
    """Adapted layers without bases: they have shapes and parameters, and no update."""

    def _bind_bases(self, layers: list[RandLoraLayer], config: RandLoraConfig, adapter_name: str) -> None:
        pass


def unbound_model(model: nn.Module, config: RandLoraConfig) -> RandLoraModel:
    """Return ``model`` with adapted layers that have no bases yet.

    Args:
        model: the base model, on the meta device for speed; it is changed.
        config: of the adapter, from code or from its folder.

    Raises:
        ConfigError: if the config fits none of the model's modules.
    """
    plain: Any = config.to_dict()
    for name in ("basis_fingerprint", "auto_mapping", "peft_version", "peft_type"):
        plain.pop(name, None)
    try:
        unbound = RandLoraConfig(**plain)
        unbound.settled = config.settled
        with torch.device("meta"):  # of r = 1 γ is as large as the weight
            return _Unbound(model, unbound, "default")
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"the adapter does not fit {type(model).__name__}: {error}") from error


def adapted_layers(model: nn.Module, config: RandLoraConfig) -> dict[str, RandLoraLayer]:
    """Return the layers that an adapter with this config has, by their names in the base model."""
    tuner = unbound_model(model, config)
    return adapted(tuner.model)


def bind_empty_bases(model: nn.Module) -> list[Tensor]:
    """Give the layers of an unbound model bases of the right sizes and no particular numbers.

    Returns:
        The tensors that they hold.
    """
    held: list[Tensor] = []
    for tuner in [m for m in model.modules() if isinstance(m, _Unbound)]:
        layers = list(adapted(tuner.model, "default").values())
        config = cast("RandLoraConfig", tuner.peft_config["default"])
        for rank, spec in define_bases(layers, config, "default").items():
            basis = Basis(spec.kind.unfilled(spec))
            held += basis.stored.numbers()
            for layer in layers:
                if layer.r["default"] == rank:
                    layer.bind_basis("default", basis)
    return held


def known_shapes(
    folder: AdapterFolder, base_model_path: str | os.PathLike[str] | None = None
) -> dict[str, RandLoraLayer]:
    """Return the adapted layers with their shapes, from the config of the base model.

    Raises:
        ConfigError: if the base model is not at hand, or another one.
    """
    base = empty_base(base_path_of(folder.config, base_model_path), task_of(folder.config))
    shapes = adapted_layers(base, folder.config)
    for name, layer in folder.layers.items():
        there = shapes.get(name)
        if there is None or there.min_dim != layer.min_dim or there.r["default"] != layer.rank:
            found = "no such layer" if there is None else f"{there.out_features}×{there.in_features}"
            raise ConfigError(
                f"the adapter in {folder.path} does not fit the model: its layer {name!r} has r={layer.rank} and a "
                f"smaller dimension of {layer.min_dim}, the model {found}"
            )
    return shapes
