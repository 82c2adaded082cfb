"""An adapter folder, read without its base model."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from randlora.errors import BasisMismatchError, CheckpointError
from randlora.ops import linear as ops
from randlora.ops.bases import Basis, BasisSpec, basis_from_projections, get_basis
from randlora.ops.operands import Sizes
from randlora.tuner.bases import combined_fingerprint, define_bases
from randlora.tuner.config import FILE_TYPES, RandLoraConfig
from randlora.tuner.files.format import GAMMA, LAMBDA, BasisNames, in_base, parts_of
from randlora.tuner.layers.base import RandLoraLayer

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE_MODEL = "base_model"  # the folder in which a run leaves the base model's config
_MOST_CONFIG_BYTES = 10 * 2**20  # a name for each of 100,000 modules
_LAMBDA, _GAMMA = f".{LAMBDA}", f".{GAMMA}"


@dataclass(frozen=True)
class SavedLayer:
    """One layer's part of an adapter file.

    Attributes:
        name: name of the layer in the base model.
        lam: λ, (..., r, n).
        gamma: γ as the file has it, (..., n, m), with the scaling's share folded in.
        scaling: factor of the update of these: alpha/r.
    """

    name: str
    lam: Tensor
    gamma: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rank r."""
        return self.lam.shape[-2]

    @property
    def num_bases(self) -> int:
        """Number n of bases."""
        return self.lam.shape[-1]

    @property
    def min_dim(self) -> int:
        """Smaller dimension m of the weight."""
        return self.gamma.shape[-1]

    @property
    def parameters(self) -> int:
        """Number of values of λ and γ."""
        return self.lam.numel() + self.gamma.numel()

    def updates(self, basis: Basis, out_features: int, in_features: int) -> Iterator[Tensor]:
        """Yield ΔW (out, in) in float32, for each matrix of the layer's weight: one, or one for each expert."""
        sizes = Sizes(max(out_features, in_features), self.min_dim, self.num_bases)
        operands = basis.operands(torch.device("cpu"), torch.float32, sizes)
        wide = out_features < in_features
        lams, gammas = (t.float().reshape(-1, *t.shape[-2:]) for t in (self.lam, self.gamma))
        for lam, gamma in zip(lams, gammas, strict=True):
            yield ops.delta_weight(operands, lam, gamma, self.scaling * basis.factor, wide)


class SavedWeights:
    """The file of weights in an adapter's folder, of any method.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the file of weights."""
        return (self.path / WEIGHTS).stat().st_size

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the file."""
        with safe_open(self.path / WEIGHTS, "pt") as file:
            return file.get_tensor(name)


@dataclass(frozen=True)
class AdapterFolder(SavedWeights):
    """A RandLoRA adapter on disk. λ and γ are in memory, everything else is read when asked for.

    Attributes:
        path: the folder.
        config: its config.
        layers: the adapted layers by their names in the base model.
        projections: for each owner of a pair of bases in the file, the names of A and B there.
        others: shapes of the other tensors by name: ``modules_to_save``, biases, token embeddings.
    """

    path: Path
    config: RandLoraConfig
    layers: dict[str, SavedLayer]
    projections: dict[str, BasisNames]
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the file."""
        with safe_open(self.path / WEIGHTS, "pt") as file:
            return list(file.keys())

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the bases A (r, 1, m) and B (M, n, r) in the file, each copy, one at a time."""
        with safe_open(self.path / WEIGHTS, "pt") as file:
            for pair in self.projections.values():
                yield file.get_tensor(pair.A), file.get_tensor(pair.B)

    def specs(self, shapes: Mapping[str, RandLoraLayer] | None = None) -> dict[int, BasisSpec] | None:
        """Return the definitions of the adapter's bases, by rank; ``None`` where sizes are missing.

        Args:
            shapes: the layers, of known shapes (``shapes.adapted_layers``). Without them the sizes must stand in the
                file, as those of bases that are in it whole.
        """
        if shapes is not None:
            return define_bases(list(shapes.values()), self.config, "default")
        whole = next((pair for pair in self.projections.values() if pair.whole), None)
        if whole is None:
            return None
        with safe_open(self.path / WEIGHTS, "pt") as file:
            min_dim, max_dim = file.get_slice(whole.A).get_shape()[-1], file.get_slice(whole.B).get_shape()[0]
        used = max(layer.min_dim for layer in self.layers.values())
        key, kind = self.config.projection_prng_key % 2**32, self.config.basis_kind(min_dim)
        return {
            rank: BasisSpec(rank, min_dim, max_dim, key, kind, min(used, min_dim), max_dim)
            for rank in sorted({layer.rank for layer in self.layers.values()})
        }

    def bases(self, specs: Mapping[int, BasisSpec]) -> dict[int, Basis]:
        """Return the bases by rank: those that are defined, or, where the file holds others, those of the file.

        Raises:
            CheckpointError: if the file's copies differ.
            BasisMismatchError: if they are not those of the config's fingerprint.
        """
        bases = {rank: get_basis(spec) for rank, spec in specs.items()}
        for number, (A, B) in enumerate(self.pairs()):
            current = bases.get(self.config.r)
            if current is None or current.same_numbers(A, B):
                continue
            if number:
                raise CheckpointError(f"{self.path / WEIGHTS} holds different bases for different layers")
            bases[self.config.r] = basis_from_projections(A, B)
        found, expected = combined_fingerprint(bases.values()), self.config.basis_fingerprint
        if expected not in (None, found):
            raise BasisMismatchError(
                f"the bases of {self.path} have fingerprint {found}, but its config records {expected}: the file is "
                "damaged, belongs to another config, or the base model is not the one it was trained for"
            )
        return bases


def adapter_path(path: str | os.PathLike[str]) -> Path:
    """Return the folder itself, or the one named ``adapter`` in it, where ``randlora train`` writes adapters."""
    inner = Path(path) / "adapter"
    return inner if (inner / CONFIG).is_file() and not (Path(path) / CONFIG).exists() else Path(path)


def unfinished(run: Path) -> str:
    """Return the message about a run that ended before it wrote its result."""
    checkpoints = sorted(run.glob("checkpoints/checkpoint-*/"), key=lambda one: (len(one.name), one.name))
    use = f", or name its last checkpoint, {checkpoints[-1]}" if checkpoints else ""
    return (
        f"the run in {os.fspath(run)!r} has not ended, so that it has no result yet: go on with "
        f"`randlora train --config {run / 'resolved.yaml'} --resume auto`{use}"
    )


def read_config(path: str | os.PathLike[str]) -> PeftConfig:
    """Return the config of an adapter folder, of any method of PEFT; from the hub where there is no such folder.

    Raises:
        CheckpointError: if there is none that can be read.
    """
    if Path(path).is_dir():
        _require_plain_config(Path(path))
    try:
        return PeftConfig.from_pretrained(os.fspath(path))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "holds" if Path(path).is_dir() else "is no folder, and as a name on the hub has"
        raise CheckpointError(f"{os.fspath(path)!r} {where} no adapter that can be read: {reason}") from None


def read_randlora_config(path: str | os.PathLike[str]) -> RandLoraConfig:
    """Return the config of an adapter folder of RandLoRA; from the hub where there is no such folder.

    Raises:
        CheckpointError: if there is none that can be read, or one of another method.
    """
    config = read_config(path)
    if not isinstance(config, RandLoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise CheckpointError(f"{os.fspath(path)!r} is an adapter of {kind}, not of RandLoRA")
    return config


def _require_plain_config(folder: Path) -> None:
    """Refuse a config that is not a JSON object that names a method, in a file of a config's size."""
    file = folder / CONFIG
    if not file.is_file():
        inside = sorted(str(found.parent) for found in folder.glob(f"*/{CONFIG}"))
        hint = f"; there is one in {', '.join(inside)}" if inside else ""
        if (folder / "resolved.yaml").is_file() and not inside:
            raise CheckpointError(unfinished(folder))
        raise CheckpointError(f"{os.fspath(folder)!r} is no adapter: it has no {CONFIG}{hint}")
    if file.stat().st_size > _MOST_CONFIG_BYTES:
        raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes, a config at most {_MOST_CONFIG_BYTES:,}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON file, or a damaged one: {error}") from None
    method = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(method, str) or method not in (*PeftType, *FILE_TYPES):
        raise CheckpointError(f"{file} is no adapter's config: it names no method of PEFT as its peft_type")


def require_loadable(
    path: str | os.PathLike[str], subfolder: str | None = None, config: PeftConfig | None = None
) -> RandLoraConfig | None:
    """Return the config of an adapter of RandLoRA that PEFT is to load from a folder. No tensor is read.

    Args:
        path: a folder; of anything else, such as a name on the hub, nothing is known yet.
        subfolder: of ``path``, as PEFT's.
        config: instead of the folder's own.

    Returns:
        The config; ``None`` where nothing is known, and of other methods.

    Raises:
        CheckpointError: if the folder holds one that cannot be loaded, whatever the model, or that would take memory
            which its file does not account for.
    """
    folder = Path(path) / (subfolder or "")
    if not folder.is_dir():
        return None
    config = config or read_config(folder)
    if not isinstance(config, RandLoraConfig):
        return None
    weights = _weights_of(folder)
    with _damage_named(weights), safe_open(weights, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            shape = file.get_slice(name).get_shape() if name.endswith(_LAMBDA) else [0, 0]
            module = in_base(name.removesuffix(_LAMBDA))
            rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
            if name.endswith(_LAMBDA) and (len(shape) < 2 or shape[-2] != rank):
                raise CheckpointError(f"{weights} holds {shape} values of λ for {module!r}, whose rank is {rank}")
    return config


def refuse_pickle(path: str | os.PathLike[str]) -> None:
    """Refuse a file that PEFT is about to unpickle, if it is of an adapter of this package.

    Raises:
        CheckpointError: if it is of a RandLoRA adapter.
    """
    try:
        content = json.loads((Path(path).parent / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(content, dict) and content.get("peft_type") in FILE_TYPES:
        raise CheckpointError(
            f"{os.fspath(path)!r} is a pickle, and nothing is unpickled from an adapter. If you trust it, rewrite it: "
            f"safetensors.torch.save_file(torch.load({PICKLE!r}, weights_only=True), {WEIGHTS!r})"
        )


def _weights_of(folder: Path) -> Path:
    """Return the folder's file of weights, after a check that it is a file: opening a pipe could wait forever."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        if (folder / PICKLE).is_file():
            refuse_pickle(folder / PICKLE)
        raise CheckpointError(f"{os.fspath(folder)!r} has no {WEIGHTS}")
    weights.open("rb").close()  # safetensors says "no such file" of any file that cannot be opened
    return weights


@contextmanager
def _damage_named(weights: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is no safetensors file, or a damaged one: {error}") from None


def read_adapter(path: str | os.PathLike[str]) -> AdapterFolder:
    """Return the adapter in a folder of ``save_pretrained``, by this package or by PEFT, or in a run's ``adapter``.

    Raises:
        CheckpointError: naming the part that is missing, broken or of another method.
    """
    folder = adapter_path(path)
    if not folder.is_dir():
        raise CheckpointError(f"there is no adapter folder {os.fspath(path)!r}")
    config = read_randlora_config(folder)
    weights = _weights_of(folder)
    with _damage_named(weights), safe_open(weights, "pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        parts = parts_of(names, config.basis_class, str(weights))
        updates = {name: file.get_tensor(name) for name in parts.updates}
    for name in [name for pair in parts.bases.values() for name in pair]:
        if len(shapes[name]) != 3:
            raise CheckpointError(f"{weights}: {name!r} has {len(shapes[name])} dimensions, a basis has 3")
    others = {name: shapes[name] for name in parts.others}
    return AdapterFolder(folder, config, _layers(updates, config, weights), parts.bases, others)


def head_size(path: str | os.PathLike[str]) -> int | None:
    """Return the number of outputs of the classification head in an adapter's file, of any method, if it has one.

    Raises:
        CheckpointError: if the file is damaged.
    """
    weights = Path(path) / WEIGHTS
    if not weights.is_file():
        return None
    with _damage_named(weights), safe_open(weights, "pt") as file:
        names = list(file.keys())
        heads = [n for n in names if re.search(r"\.(classifier|score)(\.\w+)*\.weight$", n) and "lora_" not in n]
        last = [n for n in heads if "out_proj" in n] or heads
        shape = file.get_slice(last[-1]).get_shape() if last else []
        return int(shape[0]) if shape else None


def label_names(path: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """Return the names of a classifier's labels, in the order of their numbers; ``None`` where they are unknown.

    ``randlora train`` leaves them in the base model's config beside the adapter's folder, and ``randlora convert`` in
    the new folder.
    """
    names = _config_of_run(path).get("id2label")
    if not names or head_size(path) not in (None, len(names)):
        return None
    return tuple(names[str(number)] for number in range(len(names)))


def problem_type(path: str | os.PathLike[str]) -> str | None:
    """What chooses a classifier's loss, as the config of Transformers has it; ``None`` where it is not known."""
    return _config_of_run(path).get("problem_type")


def keep_base_config(source: str | os.PathLike[str], target: Path) -> None:
    """Copy the base model's config that belongs to one adapter, if there is one, into the folder of another."""
    if (config := _base_config(source)) is not None:
        (target / BASE_MODEL).mkdir()
        shutil.copyfile(config, target / BASE_MODEL / "config.json")


def _config_of_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of the base model's config that belongs to an adapter; empty where there is none."""
    config = _base_config(path)
    content: dict[str, Any] = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
    return content


def _base_config(path: str | os.PathLike[str]) -> Path | None:
    """Return the base model's config in an adapter's folder, or beside that folder or a checkpoint's."""
    folder = Path(path).absolute()
    places = [one / BASE_MODEL / "config.json" for one in (folder, *folder.parents[:2])]
    return next((one for one in places if one.is_file()), None)


def content_of(folder: Path) -> dict[str, object]:
    """Return the content of the config file, unchecked."""
    content: dict[str, object] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return content


def _layers(tensors: dict[str, Tensor], config: RandLoraConfig, weights: Path) -> dict[str, SavedLayer]:
    layers = {}
    for key in sorted(tensors):
        if not key.endswith(_LAMBDA):
            continue
        full = key.removesuffix(_LAMBDA)
        lam, gamma = tensors[key], tensors.get(full + _GAMMA)
        if (
            gamma is None
            or min(lam.ndim, gamma.ndim) < 2
            or 0 in lam.shape
            or lam.shape[-1] != gamma.shape[-2]
            or lam.shape[:-2] != gamma.shape[:-2]
        ):
            shape = None if gamma is None else tuple(gamma.shape)
            raise CheckpointError(f"{weights}: λ {tuple(lam.shape)} and γ {shape} of {full!r} do not belong together")
        name = in_base(full)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.randlora_alpha)
        layers[name] = SavedLayer(name, lam, gamma, alpha / lam.shape[-2])
    if not layers or len(tensors) != 2 * len(layers):
        raise CheckpointError(f"{weights} holds {len(tensors)} tensors of λ and γ, for {len(layers)} layers")
    return layers
