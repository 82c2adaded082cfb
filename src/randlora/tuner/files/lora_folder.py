"""A folder of PEFT's LoRA, read without its base model, to compare RandLoRA's updates with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from randlora.errors import CheckpointError
from randlora.tuner.files.adapter_folder import WEIGHTS, SavedWeights, adapter_path, read_config
from randlora.tuner.files.format import in_base

_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


@dataclass(frozen=True)
class LoraLayer:
    """One layer's part of a LoRA file: ΔW = left @ right, or its transpose.

    Attributes:
        name: name of the layer in the base model.
        left: B times the scaling, (out, r), a convolution's too.
        right: A, (r, in·∏kernel).
    """

    name: str
    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Rank r."""
        return self.right.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of left @ right."""
        return self.left.shape[0], self.right.shape[1]


@dataclass(frozen=True)
class LoraFolder(SavedWeights):
    """A LoRA adapter on disk, its layers in memory.

    Attributes:
        path: the folder.
        config: its config.
        layers: by their names in the base model.
        others: shapes of the other tensors by name: ``modules_to_save``, biases.
    """

    path: Path
    config: LoraConfig
    layers: dict[str, LoraLayer]
    others: dict[str, tuple[int, ...]]


def read_lora_folder(path: str | os.PathLike[str]) -> LoraFolder | None:
    """Return the LoRA adapter in a folder, or in that of a run; ``None`` if there is no LoRA.

    Raises:
        CheckpointError: as of :func:`read_lora`, and if it holds no layer.
    """
    folder = adapter_path(path)
    config = read_config(folder) if folder.is_dir() else None
    if not isinstance(config, LoraConfig):
        return None
    layers = {layer.name: layer for layer in read_lora(folder)}
    if not layers:
        raise CheckpointError(f"{os.fspath(path)!r} holds no layer of LoRA")
    ends = (*_PAIRS, *_PAIRS.values())
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if not name.endswith(ends)]  # noqa: SIM118 - not a dictionary
        others = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return LoraFolder(folder, config, layers, others)


def read_lora(path: str | os.PathLike[str]) -> Iterator[LoraLayer]:
    """Yield the layers of a LoRA adapter, one at a time.

    Raises:
        CheckpointError: if it is none that can be read, or of a variant whose update is not B A alone.
    """
    config = read_config(path)
    weights = Path(path) / WEIGHTS
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{os.fspath(path)!r} is no LoRA adapter")
    if config.use_dora or getattr(config, "target_parameters", None):
        raise CheckpointError(f"{os.fspath(path)!r} is a LoRA adapter of a variant (DoRA, or target_parameters)")
    if not weights.is_file():
        raise CheckpointError(f"{os.fspath(path)!r} has no {WEIGHTS}")
    try:
        with safe_open(weights, "pt") as file:
            names = set(file.keys())
            for key in sorted(names):
                for first, second in _PAIRS.items():
                    full = key.removesuffix(first)
                    if full != key and full + second in names:
                        yield _layer(full, file.get_tensor(key), file.get_tensor(full + second), config)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is no safetensors file, or a damaged one: {error}") from None


def _layer(full: str, A: Tensor, B: Tensor, config: Any) -> LoraLayer:
    name = in_base(full)
    rank = A.shape[0]
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
    scaling = alpha / (rank**0.5 if config.use_rslora else rank)
    return LoraLayer(name, scaling * B.float().flatten(1), A.float().flatten(1))
