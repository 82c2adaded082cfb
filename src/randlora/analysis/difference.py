"""The differences between two adapters: in their configs, in their layers, and in their updates."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from randlora.errors import ConfigError
from randlora.tuner.files.adapter_folder import AdapterFolder, SavedLayer, content_of, read_adapter
from randlora.tuner.files.lora_folder import LoraFolder, LoraLayer, read_lora_folder
from randlora.tuner.shapes import known_shapes

_Folder: TypeAlias = AdapterFolder | LoraFolder
_Updates: TypeAlias = Callable[[str], Iterator[Tensor]]
_UNIMPORTANT = ("peft_version", "inference_mode", "auto_mapping")


@dataclass(frozen=True)
class LayerDifference:
    """One layer of both adapters.

    Attributes:
        name: its name in the base model.
        same_values: whether λ and γ, or the factors of two LoRAs, are equal, bit for bit.
        relative: ‖ΔW₂ − ΔW₁‖ / ‖ΔW₁‖ in the Frobenius norm; infinite where only the first does nothing, ``None`` where
            the updates are unknown.
        cosine: ⟨ΔW₁, ΔW₂⟩ / ‖ΔW₁‖‖ΔW₂‖; ``None`` likewise, and where one of them is zero.
    """

    name: str
    same_values: bool
    relative: float | None
    cosine: float | None


@dataclass(frozen=True)
class Difference:
    """Two adapters side by side.

    Attributes:
        config: the fields that differ, with both values.
        layers: the layers that both have.
        only_first: layers that only the first has.
        only_second: layers that only the second has.
        others: largest absolute difference of each other tensor of both; infinite where the shapes differ, or only one
            of them has it.
        remark: why updates are unknown, if they are.
    """

    config: dict[str, tuple[Any, Any]]
    layers: tuple[LayerDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    others: dict[str, float]
    remark: str

    @property
    def same_effect(self) -> bool:
        """Whether both adapters make the same updates, bit for bit in float32, and train the rest alike."""
        updates = all(layer.relative == 0 for layer in self.layers)
        return updates and not (self.only_first or self.only_second or any(self.others.values()))


def compare_adapters(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    base_model_path: str | os.PathLike[str] | None = None,
) -> Difference:
    """Return the differences between two adapter folders; no weights of the base model are read.

    Args:
        first: a folder.
        second: another.
        base_model_path: where the base model of both is, if not where their configs say.

    Raises:
        CheckpointError: if one is no adapter of RandLoRA or LoRA, or a damaged one.
        BasisMismatchError: if the bases of one are wrong.
        ConfigError: if ``base_model_path`` is given and does not fit.
    """
    pair = (_read(first), _read(second))
    names = [set(folder.layers) for folder in pair]
    updates, remark = _updates_of(pair, base_model_path)
    layers = [_compare_layer(pair, name, updates) for name in sorted(names[0] & names[1])]
    return Difference(
        config=_config_difference(*pair),
        layers=tuple(layers),
        only_first=tuple(sorted(names[0] - names[1])),
        only_second=tuple(sorted(names[1] - names[0])),
        others={name: _largest(pair, name) for name in sorted({*pair[0].others, *pair[1].others})},
        remark=remark,
    )


def _read(path: str | os.PathLike[str]) -> _Folder:
    return read_lora_folder(path) or read_adapter(path)


def _updates(folder: _Folder, base_model_path: str | os.PathLike[str] | None) -> _Updates:
    """Return a function that yields the updates ΔW of a layer by its name, one matrix at a time."""
    if isinstance(folder, LoraFolder):
        return lambda name: iter([folder.layers[name].left @ folder.layers[name].right])
    shapes = known_shapes(folder, base_model_path)
    specs = folder.specs(shapes)
    assert specs is not None  # the shapes are known
    bases = folder.bases(specs)

    def of(name: str) -> Iterator[Tensor]:
        layer, shape = folder.layers[name], shapes[name]
        return layer.updates(bases[layer.rank], shape.out_features, shape.in_features)

    return of


def _updates_of(
    pair: tuple[_Folder, _Folder], base_model_path: str | os.PathLike[str] | None
) -> tuple[tuple[_Updates, _Updates] | None, str]:
    try:
        return (_updates(pair[0], base_model_path), _updates(pair[1], base_model_path)), ""
    except ConfigError as error:
        if base_model_path is not None:
            raise
        return None, f"the updates are unknown: {error}"


def _config_difference(first: _Folder, second: _Folder) -> dict[str, tuple[Any, Any]]:
    a, b = content_of(first.path), content_of(second.path)
    keys = sorted({*a, *b} - set(_UNIMPORTANT))
    return {key: (_plain(a.get(key)), _plain(b.get(key))) for key in keys if _plain(a.get(key)) != _plain(b.get(key))}


def _plain(value: object) -> object:
    """Return a value of a config, with lists of names sorted: PEFT writes sets."""
    return sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _compare_layer(
    pair: tuple[_Folder, _Folder], name: str, updates: tuple[_Updates, _Updates] | None
) -> LayerDifference:
    same = _same_values(*(folder.layers[name] for folder in pair))
    if updates is None:
        return LayerDifference(name, same, None, None)
    apart = first = second = inner = 0.0
    for first_update, second_update in zip(updates[0](name), updates[1](name), strict=True):
        u, v = first_update.double(), second_update.double()
        if u.shape != v.shape:
            raise ConfigError(
                f"the layer {name!r} has {tuple(u.shape)} weights in one and {tuple(v.shape)} in the other"
            )
        apart += float((v - u).square().sum())
        first, second, inner = (
            first + float(u.square().sum()),
            second + float(v.square().sum()),
            inner + float((u * v).sum()),
        )
    relative = 0.0 if apart == 0 else math.sqrt(apart / first) if first else math.inf
    cosine = inner / math.sqrt(first * second) if first and second else None
    return LayerDifference(name, same, relative, cosine)


def _same_values(one: SavedLayer | LoraLayer, other: SavedLayer | LoraLayer) -> bool:
    if isinstance(one, LoraLayer) and isinstance(other, LoraLayer):
        return torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
    if isinstance(one, LoraLayer) or isinstance(other, LoraLayer):
        return False
    return one.scaling == other.scaling and torch.equal(one.lam, other.lam) and torch.equal(one.gamma, other.gamma)


def _largest(pair: tuple[_Folder, _Folder], name: str) -> float:
    if pair[0].others.get(name) != pair[1].others.get(name):
        return math.inf
    a, b = (folder.tensor(name).double() for folder in pair)
    return float((a - b).abs().max()) if a.numel() else 0.0
