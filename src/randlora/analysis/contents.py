"""The contents of an adapter folder: config, shapes, counts, norms and ranks, and a check of its bases."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from randlora.analysis.spectrum import spectrum, spectrum_of_product
from randlora.errors import BasisMismatchError, CheckpointError, ConfigError
from randlora.ops.bases import Basis
from randlora.tuner.files.adapter_folder import AdapterFolder, SavedLayer, content_of, read_adapter
from randlora.tuner.files.lora_folder import LoraFolder, read_lora_folder
from randlora.tuner.layers.base import RandLoraLayer
from randlora.tuner.shapes import known_shapes


@dataclass(frozen=True)
class LayerContents:
    """One adapted layer.

    Attributes:
        name: its name in the base model.
        rank: r.
        num_bases: n; 0 of a LoRA, which has no bases.
        shape: (out, in) of the weight; ``None`` where only the file is known, which says no more than its smaller side.
        min_dim: m, its smaller dimension.
        parameters: number of values of λ and γ.
        lambda_norm: Frobenius norm of λ; 0 says that the layer has not been trained; ``None`` of a LoRA.
        update_norm: Frobenius norm of ΔW, of all experts together; ``None`` without shape or bases.
        effective_rank: of ΔW (``Spectrum.effective_rank``), experts as one block-diagonal matrix; ``None`` likewise, or
            if not wanted.
    """

    name: str
    rank: int
    num_bases: int
    shape: tuple[int, int] | None
    min_dim: int
    parameters: int
    lambda_norm: float | None
    update_norm: float | None
    effective_rank: float | None


@dataclass(frozen=True)
class Contents:
    """The contents of an adapter folder.

    Attributes:
        path: its folder.
        config: its ``adapter_config.json``.
        parameters: values of λ, γ and everything else that was trained.
        file_bytes: bytes of its file of weights.
        bases_in_file: how many copies of the bases the file holds.
        fingerprint: the one that the config records.
        bases: "verified": they are those of the fingerprint, or, where none is recorded, those that the key defines;
            "from the file": others, which the file holds and no fingerprint confirms; "unknown": sizes are missing;
            "wrong": they are not those that the config records; "none": a LoRA has none.
        remark: why, where the bases are unknown or wrong.
        layers: the adapted layers.
        others: shapes of the other tensors by name.
        not_finite: names of the tensors that hold NaN or infinity.
    """

    path: str
    config: dict[str, Any]
    parameters: int
    file_bytes: int
    bases_in_file: int
    fingerprint: str | None
    bases: Literal["verified", "from the file", "unknown", "wrong", "none"]
    remark: str
    layers: tuple[LayerContents, ...]
    others: dict[str, tuple[int, ...]]
    not_finite: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong with the adapter."""
        return self.bases != "wrong" and not self.not_finite


def inspect_adapter(
    path: str | os.PathLike[str], base_model_path: str | os.PathLike[str] | None = None, ranks: bool = True
) -> Contents:
    """Return the contents of an adapter folder.

    The base model's config, if it is at hand, gives the shapes of the layers; its weights are never read.

    Args:
        path: the folder.
        base_model_path: where the base model is, if not where the adapter's config says.
        ranks: whether to compute effective ranks, which takes a decomposition of every ΔW.

    Raises:
        CheckpointError: if it is no adapter of RandLoRA or LoRA, or a damaged one.
        ConfigError: if ``base_model_path`` is given and no model, or none that the adapter fits.
    """
    lora = read_lora_folder(path)
    if lora is not None:
        return _of_lora(lora, ranks)
    folder = read_adapter(path)
    shapes, remark = _shapes(folder, base_model_path)
    bases, state, reason = _bases(folder, shapes)
    layers = [_layer(layer, shapes, bases, ranks) for layer in folder.layers.values()]
    return Contents(
        path=os.fspath(folder.path),
        config=folder.config.to_dict() | content_of(folder.path),  # its writer may have left out defaults
        parameters=sum(layer.parameters for layer in folder.layers.values())
        + sum(math.prod(shape) for shape in folder.others.values()),
        file_bytes=folder.nbytes,
        bases_in_file=len(folder.projections),
        fingerprint=folder.config.basis_fingerprint,
        bases=state,
        remark=reason or remark,
        layers=tuple(layers),
        others=folder.others,
        not_finite=tuple(_not_finite(folder)),
    )


def _of_lora(folder: LoraFolder, ranks: bool) -> Contents:
    layers = []
    for layer in folder.layers.values():
        count = layer.left.numel() + layer.right.numel()
        finite = bool(layer.left.isfinite().all() and layer.right.isfinite().all())
        found = spectrum_of_product(layer.left, layer.right) if finite else None
        norm, rank = (found.norm, found.effective_rank if ranks else None) if found else (None, None)
        small = min(layer.shape)
        layers.append(LayerContents(layer.name, layer.rank, 0, layer.shape, small, count, None, norm, rank))
    damaged = [layer.name for layer in layers if layer.update_norm is None]
    return Contents(
        path=os.fspath(folder.path),
        config=folder.config.to_dict() | content_of(folder.path),
        parameters=sum(layer.parameters for layer in layers) + sum(map(math.prod, folder.others.values())),
        file_bytes=folder.nbytes,
        bases_in_file=0,
        fingerprint=None,
        bases="none",
        remark="",
        layers=tuple(layers),
        others=folder.others,
        not_finite=(*damaged, *(name for name in folder.others if not folder.tensor(name).isfinite().all())),
    )


def _shapes(
    folder: AdapterFolder, base_model_path: str | os.PathLike[str] | None
) -> tuple[Mapping[str, RandLoraLayer] | None, str]:
    try:
        return known_shapes(folder, base_model_path), ""
    except ConfigError as error:
        if base_model_path is not None:
            raise
        return None, f"the shapes of the layers are unknown: {error}"


def _bases(
    folder: AdapterFolder, shapes: Mapping[str, RandLoraLayer] | None
) -> tuple[dict[int, Basis], Literal["verified", "from the file", "unknown", "wrong"], str]:
    specs = folder.specs(shapes)
    if specs is None:
        return {}, "unknown", ""
    try:
        bases = folder.bases(specs)
    except (BasisMismatchError, CheckpointError) as error:
        return {}, "wrong", str(error)
    drawn = all(basis.spec is not None for basis in bases.values())
    return bases, "verified" if drawn or folder.config.basis_fingerprint else "from the file", ""


def _layer(
    layer: SavedLayer, shapes: Mapping[str, RandLoraLayer] | None, bases: Mapping[int, Basis], ranks: bool
) -> LayerContents:
    shape = None if shapes is None else (shapes[layer.name].out_features, shapes[layer.name].in_features)
    norm, rank = None, None
    if shape is not None and layer.rank in bases:
        norm, rank = _measure(layer.updates(bases[layer.rank], *shape), ranks)
    return LayerContents(
        name=layer.name,
        rank=layer.rank,
        num_bases=layer.num_bases,
        shape=shape,
        min_dim=layer.min_dim,
        parameters=layer.parameters,
        lambda_norm=float(layer.lam.float().norm()),
        update_norm=norm,
        effective_rank=rank,
    )


def _measure(updates: Iterable[Tensor], ranks: bool) -> tuple[float, float | None]:
    """Return the norm and the effective rank of the updates, as the report has them."""
    found = list(updates)
    norm = math.sqrt(sum(float(update.double().square().sum()) for update in found))
    return norm, spectrum(found).effective_rank if ranks and math.isfinite(norm) else None


def _not_finite(folder: AdapterFolder) -> Iterator[str]:
    for layer in folder.layers.values():
        yield from (
            f"{layer.name}.{name}" for name, t in (("λ", layer.lam), ("γ", layer.gamma)) if not t.isfinite().all()
        )
    yield from (name for name in folder.others if not folder.tensor(name).isfinite().all())
