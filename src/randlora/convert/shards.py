"""A model with its adapters merged, in the format of ``save_pretrained``, written shard by shard.

The model stays as it is. Beside it, only the changed tensors of one shard are in memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from randlora.errors import ConfigError, MergeError
from randlora.tuner.adapters.merged import MergedTensor, base_model, merged_tensors
from randlora.tuner.base_model import base_path_of, head_arguments, load_base, task_of, with_adapter
from randlora.tuner.files.adapter_folder import read_randlora_config
from randlora.tuner.files.atomic import folder_atomically, write_json

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNLIMITED = "1000TB"


def save_merged(
    model: nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    adapter_names: list[str] | None = None,
    max_shard_size: int | str = "5GB",
    base_model_path: str | os.PathLike[str] | None = None,
    **base_model_arguments: Any,
) -> None:
    """Write the model with its adapters merged as a folder that ``from_pretrained`` loads without PEFT.

    The folder appears when everything is in it.

    Args:
        model: a Transformers model with adapters, or the folder of a saved adapter.
        folder: where to write; there must be nothing yet.
        adapter_names: the adapters to merge; by default the active ones.
        max_shard_size: bytes in a file, as a number or such as ``"5GB"``.
        base_model_path: for the folder of an adapter, where its base model is now, if not where its config says.
        **base_model_arguments: for the folder of an adapter, passed to the base model's ``from_pretrained``.

    Raises:
        ConfigError: if there is something in ``folder``, or the model is none of Transformers'.
        MergeError: if adapters are merged already, a merged weight is not finite, or the model is quantised or
            offloaded.
    """
    if not isinstance(model, nn.Module):
        model = _load(model, base_model_path, base_model_arguments)
    base = base_model(model)
    limit = _bytes(max_shard_size)
    shards = list(_shards(_tied(_savable(base, adapter_names)), limit))
    with folder_atomically(folder) as temporary:
        untied, total = False, 0
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            written = _write_shard(base, shard, temporary, f"model{suffix}.safetensors")
            weight_map |= dict.fromkeys(written.names, f"model{suffix}.safetensors")
            untied, total = untied or written.untied, total + written.nbytes
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(index, temporary, "model.safetensors.index.json")
        if untied:
            _declare_untied(temporary)


def _load(path: str | os.PathLike[str], base_path: Any, arguments: dict[str, Any]) -> nn.Module:
    """Return the base model of a saved adapter with the adapter in it, in evaluation mode."""
    config = read_randlora_config(path)
    head = {} if "num_labels" in arguments else head_arguments(path)
    base = load_base(base_path_of(config, base_path), task_of(config), **head, **arguments)
    return with_adapter(base, path)


def _savable(base: nn.Module, adapter_names: list[str] | None) -> list[MergedTensor]:
    if not isinstance(base, PreTrainedModel):
        raise ConfigError(
            f"{type(base).__name__} is not a model of Transformers, whose format this is: use `merge_and_unload()` and "
            "save the result as such models are saved"
        )
    if getattr(base, "hf_quantizer", None) is not None:
        raise MergeError("a quantised model cannot be saved merged without rounding again: load it unquantised")
    tensors = list(merged_tensors(base, adapter_names))
    offloaded = [tensor.name for tensor in tensors if tensor.held.is_meta]
    if offloaded:
        raise MergeError(f"{offloaded[0]!r} and {len(offloaded) - 1} more tensors are offloaded: load the model whole")
    if not any(tensor.merged for tensor in tensors):
        raise ConfigError(f"there is nothing to merge: no layer has an adapter of {adapter_names or 'the active ones'}")
    return tensors


def _tied(tensors: list[MergedTensor]) -> list[list[MergedTensor]]:
    """Return the tensors in their order, tied tensors as one group."""
    groups: dict[int, list[MergedTensor]] = {}
    for tensor in tensors:
        groups.setdefault(id(tensor.held), []).append(tensor)
    return list(groups.values())


def _shards(groups: list[list[MergedTensor]], limit: int) -> Iterator[list[list[MergedTensor]]]:
    shard: list[list[MergedTensor]] = []
    size = 0
    for group in groups:
        nbytes = sum(tensor.held.nbytes for tensor in group[: 1 + any(t.merged for t in group)])
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(group)
        size += nbytes
    if shard:
        yield shard


class _Written(NamedTuple):
    names: list[str]  # in the file
    nbytes: int
    untied: bool  # whether some that were one in the model no longer are


def _write_shard(base: Any, shard: list[list[MergedTensor]], folder: Path, name: str) -> _Written:
    """Let the model save these tensors in its own way; they are freed with the return."""
    tensors, untied = _make(shard)
    nbytes = sum({value.data_ptr(): value.nbytes for value in tensors.values()}.values())
    part = folder / "part"
    with _not_in_peft_format(base):
        base.save_pretrained(part, state_dict=tensors, max_shard_size=_UNLIMITED)
    (part / "model.safetensors").rename(folder / name)
    for file in part.iterdir():
        file.replace(folder / file.name)
    part.rmdir()
    with safe_open(folder / name, "pt") as saved:
        return _Written(list(saved.keys()), nbytes, untied)


def _make(shard: list[list[MergedTensor]]) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors of a shard by name, and whether tensors that the model ties now differ."""
    tensors: dict[str, Tensor] = {}
    untied = False
    for group in shard:
        first: Tensor | None = None
        for member in group:
            made = member.make()
            if first is None:
                first = made
            elif made.data_ptr() != first.data_ptr():
                same = torch.equal(made, first)
                made, untied = (first, untied) if same else (made, True)
            tensors[member.name] = made
    return tensors, untied


@contextmanager
def _not_in_peft_format(base: Any) -> Iterator[None]:
    """Let a model to which Transformers has added adapters save itself, and not only these, within the context."""
    flag = getattr(base, "_hf_peft_config_loaded", False)
    base._hf_peft_config_loaded = False
    try:
        yield
    finally:
        base._hf_peft_config_loaded = flag


def _declare_untied(folder: Path) -> None:
    """Record in the config that an adapter has changed one of two embeddings that were tied."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config") or {}):
        if part is config or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    write_json(config, folder, "config.json")


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", str(size), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"max_shard_size={size!r} must be a number of bytes above 0, or such as '5GB'")
    return max(int(float(found[1]) * _UNITS[found[2].upper()]), 1)
