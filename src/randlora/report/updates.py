"""The updates of an adapter, layer by layer, beside LoRA's, and the sizes of λ and γ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from randlora.analysis.spectrum import Spectrum, spectrum, spectrum_of_product
from randlora.errors import ConfigError, RandLoraError
from randlora.tuner.files.adapter_folder import read_adapter, read_config
from randlora.tuner.files.lora_folder import read_lora
from randlora.tuner.shapes import known_shapes

_MOST_COLUMNS = 32


@dataclass(frozen=True)
class LayerUpdate:
    """One adapted layer.

    Attributes:
        name: name of the layer in the base model.
        spectrum: spectrum of ΔW; ``None`` where it cannot be computed.
        lam: mean |λ_b| of each basis b, or of groups of neighbours if there are more than 32 bases. ``None`` for LoRA.
        gamma: mean |γ_b|, likewise.
    """

    name: str
    spectrum: Spectrum | None
    lam: tuple[float, ...] | None = None
    gamma: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Updates:
    """All layers of an adapter.

    Attributes:
        layers: layers sorted by name, with layer 10 after layer 2.
        remark: reason why something is missing; empty if nothing is.
    """

    layers: tuple[LayerUpdate, ...] = ()
    remark: str = ""


def measure_updates(adapter: Path, base: Path | None, tick: Callable[[str], None]) -> Updates:
    """Return the updates of an adapter. The base model's weights are not read, and one layer at a time is in memory.

    Args:
        adapter: folder of the adapter.
        base: folder with the config of the base model; by default the model that the adapter's config names.
        tick: called with the name of each layer.
    """
    try:
        kind = str(getattr(read_config(adapter).peft_type, "value", "")).upper()
        if kind == "RANDLORA":
            return _of_randlora(adapter, base, tick)
        if kind == "LORA":
            return Updates(tuple(sorted(_of_lora(adapter, tick), key=lambda layer: natural(layer.name))))
    except RandLoraError as error:
        return Updates(remark=str(error))
    return Updates(remark=f"updates of {kind} adapters are not computed, only those of RandLoRA and LoRA")


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key for a layer's name that puts layer 10 after layer 2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _of_randlora(adapter: Path, base: Path | None, tick: Callable[[str], None]) -> Updates:
    folder = read_adapter(adapter)
    remark = ""
    try:
        shapes = known_shapes(folder, base)
        specs = folder.specs(shapes)
        bases = {} if specs is None else folder.bases(specs)
    except RandLoraError as error:
        remark, shapes, bases = f"λ and γ only, no updates: {error}", {}, {}
    layers = []
    for name in sorted(folder.layers, key=natural):
        layer, found = folder.layers[name], None
        tick(name)
        if not (layer.lam.isfinite().all() and layer.gamma.isfinite().all()):
            remark = f"λ or γ of {name} is not finite"
        elif name in shapes and layer.rank in bases:
            there = shapes[name]
            try:
                found = spectrum(layer.updates(bases[layer.rank], there.out_features, there.in_features))
            except ConfigError as error:
                remark = f"{name}: {error}"
        layers.append(LayerUpdate(name, found, _column_means(layer.lam.mT), _column_means(layer.gamma)))
    return Updates(tuple(layers), remark)


def _of_lora(adapter: Path, tick: Callable[[str], None]) -> Iterator[LayerUpdate]:
    for layer in read_lora(adapter):
        tick(layer.name)
        if not (layer.left.isfinite().all() and layer.right.isfinite().all()):
            raise ConfigError(f"the LoRA of {layer.name} is not finite")
        yield LayerUpdate(layer.name, spectrum_of_product(layer.left, layer.right))


def _column_means(values: Tensor) -> tuple[float, ...]:
    """Return the mean of |values| (..., n, k) for each of the n bases, or for at most 32 groups of bases."""
    by_basis = values.float().abs().movedim(-2, 0).flatten(1).mean(1)
    width = math.ceil(len(by_basis) / _MOST_COLUMNS)
    return tuple(float(group.mean()) for group in by_basis.split(width))
