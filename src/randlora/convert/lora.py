"""A plain LoRA adapter in the place of a RandLoRA one, by truncated SVD of each layer's update.

LoRA holds updates of low rank, RandLoRA of full rank, so something is lost: how much is part of the result.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from randlora.errors import CheckpointError, CombinationError, ConfigError, UnsupportedLayerError
from randlora.tuner.adapters.merged import base_model
from randlora.tuner.base_model import base_path_of, empty_base, task_of, with_adapter
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.files.adapter_folder import head_size, keep_base_config, read_adapter
from randlora.tuner.files.atomic import folder_atomically, write_atomically, write_json
from randlora.tuner.files.format import in_base, in_file
from randlora.tuner.layers.base import RandLoraLayer, adapted
from randlora.tuner.wrappers import plain_view

_BIAS: dict[str, Literal["none", "all", "lora_only"]] = {"none": "none", "all": "all", "randlora_only": "lora_only"}


@dataclass(frozen=True)
class ConvertedLayer:
    """The error of the conversion of a layer.

    Attributes:
        name: name of the layer in the base model.
        rank: rank of its LoRA.
        relative_error: ‖ΔW − BA‖ / ‖ΔW‖ in the Frobenius norm; no LoRA of that rank has a smaller one.
    """

    name: str
    rank: int
    relative_error: float


@dataclass(frozen=True)
class LoraConversion:
    """A LoRA adapter, and its error against the adapter that it was made of.

    Attributes:
        config: its config. Each layer's scaling is 1: alpha is its rank.
        tensors: the content of its file.
        layers: the error of each layer.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    layers: tuple[ConvertedLayer, ...]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write an adapter folder that PEFT, without this package, loads as LoRA; each file whole or not at all."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(
            target / "adapter_model.safetensors",
            lambda temporary: save_file(self.tensors, temporary, metadata={"format": "pt"}),
        )
        content = {k: sorted(v) if isinstance(v, set) else v for k, v in self.config.to_dict().items()}
        write_json(content, target, "adapter_config.json")


@torch.no_grad()
def to_lora(
    model: nn.Module,
    adapter_name: str | Mapping[str, float] = "default",
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
) -> LoraConversion:
    """Return the LoRA adapter that is nearest to a RandLoRA adapter, or to a weighted sum of several.

    Biases, ``modules_to_save`` and trainable tokens of the adapter go with it.

    Args:
        model: a model with the adapter.
        adapter_name: its name, or weights by name for a sum.
        rank: rank of every layer, or of each by its name. A layer has at most the rank of its smaller dimension. With
            one rank for all, the factors of smaller layers are filled with zeros, so that the file has one rank.
        energy: instead of a rank, which share (above 0, up to 1) of each update's squared singular values to keep.

    Raises:
        ConfigError: if not exactly one of ``rank`` and ``energy`` is given, or it means nothing.
        CheckpointError: if an update is not finite.
        CombinationError: for a sum of adapters that hold more than updates.
        UnsupportedLayerError: for a layer whose update no LoRA can take the place of: one of a kind that is not
            linear, or one whose weight is read by the module around it, which never calls the layer.
    """
    _require_choice(rank, energy)
    model = plain_view(model)
    weights = {adapter_name: 1.0} if isinstance(adapter_name, str) else dict(adapter_name)
    configs = [_config_of(model, name) for name in weights]
    base = base_model(model)
    found, tensors = [], {}
    layers = adapted(base, *weights)
    _require_convertible(layers)
    for name, layer in layers.items():
        update = cast("Tensor", sum(w * layer.get_delta_weight(a) for a, w in weights.items() if a in layer.r))
        oriented = (update.T if layer.fan_in_fan_out else update).float()
        if not oriented.isfinite().all():
            raise CheckpointError(f"the update of {name!r} is not finite: the run that made it had diverged")
        U, S, Vh = torch.linalg.svd(oriented, full_matrices=False)
        kept = _kept(S, rank if not isinstance(rank, Mapping) else _rank_of(rank, name), energy)
        root = S[:kept].sqrt()
        tensors[in_file(f"{name}.lora_A.weight")] = (root.unsqueeze(1) * Vh[:kept]).cpu().contiguous()
        tensors[in_file(f"{name}.lora_B.weight")] = (U[:, :kept] * root).cpu().contiguous()
        found.append(ConvertedLayer(name, kept, _relative_error(S, kept)))
    if isinstance(rank, int):
        _fill_to_one_rank(tensors)
    if len(weights) == 1:
        tensors |= _other_tensors(model, next(iter(weights)))
    else:
        _require_updates_only(dict(zip(weights, configs, strict=True)))
    ranks = {name: len(tensors[in_file(f"{name}.lora_A.weight")]) for name in layers}
    return LoraConversion(_lora_config(base, configs[0], layers, ranks), tensors, tuple(found))


def convert_folder_to_lora(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    base_model_path: str | os.PathLike[str] | None = None,
) -> LoraConversion:
    """Convert an adapter folder to the nearest LoRA in a new folder; of the base model only the config is read.

    Args:
        adapter: folder of a RandLoRA adapter.
        folder: where to write; there must be nothing yet.
        rank: as of :func:`to_lora`.
        energy: as of :func:`to_lora`.
        base_model_path: where the base model is, if not where the adapter's config says.

    Raises:
        CheckpointError: if ``adapter`` is no adapter of RandLoRA, or a damaged one.
        ConfigError: if there is something in ``folder``, the base model's config is not at hand, or as of ``to_lora``.
    """
    _require_choice(rank, energy)
    source = read_adapter(adapter)
    config = source.config
    with folder_atomically(folder) as temporary:
        # weights that nobody reads or writes take no memory; on the meta device λ and γ would lose their values
        count = head_size(source.path)
        head: dict[str, Any] = {} if count is None else {"num_labels": count}
        base = empty_base(base_path_of(config, base_model_path), task_of(config), **head)
        model = with_adapter(base.to_empty(device="cpu"), source.path)
        conversion = to_lora(model, rank=rank, energy=energy)
        conversion.save(temporary)
        keep_base_config(source.path, temporary)
    return conversion


def _require_choice(rank: int | Mapping[str, int] | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ConfigError(f"rank={rank!r}, energy={energy!r}: give one of them, and only one")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy={energy!r} must be a share, above 0 and up to 1")
    for value in rank.values() if isinstance(rank, Mapping) else [rank]:
        if value is not None and value < 1:
            raise ConfigError(f"rank={value!r} must be at least 1")


def _config_of(model: nn.Module, adapter_name: str) -> RandLoraConfig:
    configs = cast("Mapping[str, Any]", getattr(model, "peft_config", {}))
    if not isinstance(configs.get(adapter_name), RandLoraConfig):
        known = ", ".join(repr(name) for name, config in configs.items() if isinstance(config, RandLoraConfig))
        raise ConfigError(f"the model has no RandLoRA adapter {adapter_name!r}, only {known or 'none'}")
    return configs[adapter_name]


def _require_convertible(layers: Mapping[str, RandLoraLayer]) -> None:
    for name, layer in layers.items():
        reason = layer.why_no_lora()
        if reason is not None:
            raise UnsupportedLayerError(
                f"{name!r}, a {type(layer.get_base_layer()).__name__}, cannot be converted to LoRA: {reason}. Merge "
                "the adapter instead (`randlora.convert.save_merged`)"
            )


def _rank_of(ranks: Mapping[str, int], name: str) -> int:
    if name not in ranks:
        raise ConfigError(f"rank names no rank for {name!r}: it must have every adapted layer")
    return ranks[name]


def _kept(S: Tensor, rank: int | None, energy: float | None) -> int:
    """Return the number of singular values to keep, at least one."""
    if rank is not None:
        return min(rank, len(S))
    assert energy is not None
    share = S.double().square().cumsum(0)
    return min(int(torch.searchsorted(share, energy * share[-1]).item()) + 1, len(S))


def _relative_error(S: Tensor, kept: int) -> float:
    squares = S.double().square()
    total = float(squares.sum())
    return math.sqrt(float(squares[kept:].sum()) / total) if total else 0.0


def _fill_to_one_rank(factors: dict[str, Tensor]) -> None:
    """Widen all to the widest: readers without patterns scale by alpha over the layer's rank, or over the config's."""
    widest = max(len(factor) for name, factor in factors.items() if ".lora_A." in name)
    for name, factor in factors.items():
        filling = (0, 0, 0, widest - len(factor)) if ".lora_A." in name else (0, widest - factor.shape[1])
        factors[name] = nn.functional.pad(factor, filling)


def _other_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the tensors of the adapter's file other than λ, γ and bases."""
    content = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {
        in_file(in_base(key)): value.detach().cpu().clone()  # tied ones may not share memory in a file
        for key, value in content.items()
        if "randlora_" not in key
    }


def _require_updates_only(configs: Mapping[str, RandLoraConfig]) -> None:
    for name, config in configs.items():
        for field in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, field, None):
                raise CombinationError(
                    f"adapter {name!r} has {field}={getattr(config, field)!r}, and whole modules cannot be added in a "
                    "LoRA: convert the adapters one by one, or merge them"
                )
        if config.bias != "none":
            raise CombinationError(f"adapter {name!r} has bias={config.bias!r}; biases cannot be added in a LoRA")


def _lora_config(
    base: nn.Module, config: RandLoraConfig, layers: Mapping[str, RandLoraLayer], ranks: Mapping[str, int]
) -> LoraConfig:
    usual = Counter(ranks.values()).most_common(1)[0][0]
    targets, excluded = _targets(base, set(layers))
    unusual = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    tokens = {
        name: getattr(config, name)
        for name in ("trainable_token_indices", "ensure_weight_tying")
        if getattr(config, name, None)
    }
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=unusual,
        alpha_pattern=dict(unusual),
        target_modules=targets,
        exclude_modules=excluded or None,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        bias=_BIAS[config.bias],
        modules_to_save=config.modules_to_save and list(dict.fromkeys(config.modules_to_save)),  # PEFT adds twice
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        **tokens,
    )


def _targets(base: nn.Module, names: set[str]) -> tuple[list[str], list[str]]:
    """Return target modules that hit ``names`` only, as last parts of names where possible, and modules to exclude."""
    others = {name for name, _ in base.named_modules()} - names
    leaves = {name.rpartition(".")[2] for name in names}
    if not any(other.rpartition(".")[2] in leaves for other in others):
        return sorted(leaves), []
    return sorted(names), sorted(other for other in others if any(other.endswith(f".{name}") for name in names))
