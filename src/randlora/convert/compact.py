"""Adapter files without their bases: those that PEFT wrote repeat the bases, drawn numbers, for every layer.

Nothing is believed: the bases are drawn again and compared with every copy in the old file, and the new folder is read
back from disk and compared with the old one, before the old one may go.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from randlora.errors import CheckpointError, ConfigError
from randlora.ops.bases import Basis
from randlora.tuner.bases import combined_fingerprint, define_bases
from randlora.tuner.files.adapter_folder import (
    CONFIG,
    WEIGHTS,
    AdapterFolder,
    content_of,
    keep_base_config,
    read_adapter,
)
from randlora.tuner.files.atomic import disk_errors, folder_atomically, write_atomically, write_json
from randlora.tuner.files.format import HOST
from randlora.tuner.shapes import known_shapes


@dataclass(frozen=True)
class Compacted:
    """The result of compacting an adapter.

    Attributes:
        path: the folder that is small now.
        bytes_before: of the file of weights.
        bytes_after: of the new one.
        bases_kept: whether the bases had to stay in the file, once, because its key does not define them.
        fingerprint: of the bases; now in the config.
        compared: tensors that were compared bit by bit, those of the old file that are gone included.
    """

    path: str
    bytes_before: int
    bytes_after: int
    bases_kept: bool
    fingerprint: str
    compared: int


def compact_adapter(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    base_model_path: str | os.PathLike[str] | None = None,
) -> Compacted:
    """Write an adapter without the bases that can be drawn again.

    Other files of the folder, such as a tokenizer, stay where they are.

    Args:
        source: a folder that PEFT wrote, or this package.
        target: a new folder; ``None`` replaces the files of ``source``, each in one step, so that whoever loads the
            adapter meanwhile, or after a crash at any moment, gets the right one.
        base_model_path: where the base model is, if not where the adapter's config says; its config is needed only
            for files of this package that hold a part of the bases.

    Raises:
        CheckpointError: if ``source`` is no adapter of RandLoRA, or a damaged one, or the new files do not read back
            as they should; the old ones are as they were.
        BasisMismatchError: if its bases are not those of its fingerprint.
        ConfigError: if there is something in ``target``, or the file holds no bases that could go.
    """
    old = read_adapter(source)
    if not old.projections:
        raise ConfigError(
            f"{old.path / WEIGHTS} holds no bases that could be left out: it is as compact as it gets "
            f"({old.nbytes:,} bytes)"
        )
    specs = old.specs() or define_bases(list(known_shapes(old, base_model_path).values()), old.config, "default")
    bases = old.bases(specs)
    kept = bases[old.config.r] if old.config.r in bases and bases[old.config.r].spec is None else None
    content = content_of(old.path) | {
        "save_projection": kept is not None,
        "basis_fingerprint": combined_fingerprint(bases.values()),
    }
    before = old.nbytes
    if target is None:
        compared = _replace(old, content, kept)
    else:
        with folder_atomically(target) as temporary:
            compared = _write(old, content, kept, temporary)
            keep_base_config(old.path, temporary)
    there = old.path if target is None else Path(target)
    after = (there / WEIGHTS).stat().st_size
    return Compacted(str(there), before, after, kept is not None, str(content["basis_fingerprint"]), compared)


def _write(old: AdapterFolder, content: dict[str, Any], kept: Basis | None, folder: Path) -> int:
    """Write both files into ``folder``, read them back, and return the number of tensors compared."""
    save_file(_tensors(old, kept), folder / WEIGHTS, metadata={"format": "pt"})
    write_json(content, folder, CONFIG)
    return _verify(old, read_adapter(folder), kept)


def _replace(old: AdapterFolder, content: dict[str, Any], kept: Basis | None) -> int:
    """Replace the old files by new ones; in between, the new config with the old weights loads as well."""
    with disk_errors(old.path), tempfile.TemporaryDirectory(dir=old.path, prefix=".compact.") as trial:
        compared = _write(old, content, kept, Path(trial))
        write_json(content, old.path, CONFIG)
        write_atomically(old.path / WEIGHTS, lambda temporary: os.replace(Path(trial) / WEIGHTS, temporary))
    return compared


def _tensors(old: AdapterFolder, kept: Basis | None) -> dict[str, Tensor]:
    tensors = {name: old.tensor(name) for name in _kept_names(old)}
    if kept is not None:
        A, B = kept.projections()
        tensors |= {f"{HOST}randlora_A": A.contiguous(), f"{HOST}randlora_B": B.contiguous()}
    return tensors


def _verify(old: AdapterFolder, new: AdapterFolder, kept: Basis | None) -> int:
    """Return the number of tensors, after comparing those that were read back with the old ones.

    Raises:
        CheckpointError: if anything differs.
    """
    names = _kept_names(old)
    wrong = [name for name in names if not _same_bits(old.tensor(name), new.tensor(name))]
    if kept is not None and any(not kept.same_numbers(*pair) for pair in new.pairs()):
        wrong.append("bases")
    if wrong or set(old.layers) != set(new.layers):
        raise CheckpointError(f"the new file does not read back as the old one: {', '.join(wrong[:3])}")
    return len(old.names)  # `old.bases` has compared the bases


def _kept_names(old: AdapterFolder) -> list[str]:
    """Return the names of all tensors but the bases."""
    bases = {name for pair in old.projections.values() for name in pair}
    return [name for name in old.names if name not in bases]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal in dtype and every bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
