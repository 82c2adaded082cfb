"""A folder of PEFT's LoRA, read without its base model: what RandLoRA's updates are compared with."""

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
from randlora.tuner.files.adapter_folder import WEIGHTS, read_config
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


def read_lora(path: str | os.PathLike[str]) -> Iterator[LoraLayer]:
    """The layers of a LoRA adapter, one at a time.

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
