"""From an adapter folder to a model folder that needs nothing else: merged weights, and the tokenizer or processor."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils import cached_file

from randlora.convert.shards import save_merged
from randlora.errors import ConfigError, MergeError
from randlora.tuner.base_model import base_path_of, head_arguments, load_base, task_of, with_adapter
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.files.adapter_folder import adapter_path, read_config
from randlora.tuner.files.atomic import folder_atomically

_PIECES = "tokenizer.model"  # sentencepiece's own file
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergedFolder:
    """A model folder.

    Attributes:
        path: the folder.
        nbytes: bytes of its files of weights.
        files: their number.
        dtype: of the first weight.
        tokenizer: whether a tokenizer is in it.
        image_processor: whether that of a model of images is.
    """

    path: str
    nbytes: int
    files: int
    dtype: str
    tokenizer: bool
    image_processor: bool


def merge_folder(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    base_model_path: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    **base_model_arguments: Any,
) -> MergedFolder:
    """Merge an adapter folder into its base model, and write the whole with the tokenizer of one of them.

    Models of images have an image processor instead.

    Args:
        adapter: folder of the adapter, of RandLoRA or another method of PEFT's, or of the run that made it.
        folder: where to write; there must be nothing yet.
        base_model_path: where the base model is, if not where the adapter's config says.
        dtype: "auto" for that of the base model's files, or its name. Half precision rounds small updates away.
        max_shard_size: bytes in a file, as of :func:`save_merged`.
        **base_model_arguments: passed to the base model's ``from_pretrained``.

    Raises:
        CheckpointError: if there is no adapter.
        ConfigError: for an unknown dtype, a base model that cannot be loaded, or as of :func:`save_merged`.
        MergeError: as of :func:`save_merged`.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):  # before anything is loaded
        raise ConfigError(f"there is something in {folder} already: name a folder that does not exist")
    adapter = adapter_path(adapter)
    config = read_config(adapter)
    source = base_path_of(config, base_model_path)
    arguments: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), **base_model_arguments}
    if isinstance(config, RandLoraConfig):
        save_merged(adapter, folder, max_shard_size=max_shard_size, base_model_path=source, **arguments)
    else:
        _merge_by_peft(config, adapter, target, source, max_shard_size, arguments)
    trusted = bool(base_model_arguments.get("trust_remote_code", False))
    places = (os.fspath(adapter), source)
    prepares = [_save_processor(one, places, target, trusted) for one in (AutoTokenizer, AutoImageProcessor)]
    if prepares[0]:
        _keep_pieces(places, target, trusted)
    files = sorted(target.glob("*.safetensors"))
    with safe_open(files[0], "pt") as file:
        found = file.get_tensor(next(iter(file.keys()))).dtype
    name = str(found).removeprefix("torch.")
    return MergedFolder(str(target), sum(file.stat().st_size for file in files), len(files), name, *prepares)


def _merge_by_peft(
    config: PeftConfig, adapter: Path, folder: Path, source: str, max_shard_size: int | str, arguments: dict[str, Any]
) -> None:
    """Merge an adapter of another method, such as LoRA, by PEFT, which holds the whole model in memory."""
    base = load_base(source, task_of(config), **head_arguments(adapter), **arguments)
    model: Any = with_adapter(base, adapter)
    if not hasattr(model, "merge_and_unload"):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise MergeError(f"{os.fspath(adapter)!r} is an adapter of {kind}, which cannot be merged into weights")
    with folder_atomically(folder) as temporary:
        model.merge_and_unload().save_pretrained(temporary, max_shard_size=max_shard_size)


def _save_processor(auto_class: Any, places: tuple[str, ...], folder: Path, trusted: bool) -> bool:
    """Whether there is one in a place; the first is written."""
    for place in places:
        try:
            processor = auto_class.from_pretrained(place, trust_remote_code=trusted)
        except (OSError, ValueError, KeyError):
            continue
        processor.save_pretrained(str(folder))
        return True
    return False


def _keep_pieces(places: tuple[str, ...], folder: Path, trusted: bool) -> None:
    """Copies sentencepiece's file, which Transformers no longer writes, if the tokenizer still has all its tokens.

    Other programs read it: llama.cpp's converter finds the scores of the pieces there only, and cuts texts into other
    tokens without them.
    """
    written = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trusted).get_vocab()
    for place in places:
        try:
            file = cached_file(place, _PIECES)
            vocabulary = AutoTokenizer.from_pretrained(place, trust_remote_code=trusted).get_vocab()
        except (OSError, ValueError, KeyError):
            continue
        if file is not None and vocabulary.items() <= written.items():
            shutil.copyfile(file, folder / _PIECES)
            return
