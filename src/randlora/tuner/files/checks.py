"""Checks of an adapter's file: it may bring all that is the adapter's own into a model, and nothing else.

PEFT copies whatever tensors of a file the model has a name for, base weights included, and is silent about the rest.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from randlora.errors import CheckpointError
from randlora.tuner.config import RandLoraConfig
from randlora.tuner.experts import SINGLE_EXPERTS
from randlora.tuner.files.format import GAMMA, LAMBDA, in_base
from randlora.tuner.layers.base import adapted

_OURS = ("randlora_A", "randlora_B", LAMBDA, GAMMA)


def require_sound_values(content: Mapping[str, Tensor]) -> None:
    """Require that λ, γ and bases are finite floating point numbers, and other tensors free of NaN.

    (Those are modules that were trained in full, whose buffers may hold infinities.)

    Raises:
        CheckpointError: naming the tensors.
    """
    ours = {name: tensor for name, tensor in content.items() if any(part in name for part in _OURS)}
    others = {name: tensor for name, tensor in content.items() if name not in ours and tensor.is_floating_point()}
    integers = [f"{name} ({tensor.dtype})" for name, tensor in ours.items() if not tensor.is_floating_point()]
    if integers:
        raise CheckpointError(f"the file holds numbers that are not floating point: {_some(integers)}")
    broken = [name for name, tensor in ours.items() if not tensor.float().isfinite().all()]
    broken += [name for name, tensor in others.items() if tensor.float().isnan().any()]
    if broken:
        raise CheckpointError(
            f"the file holds values that are not finite in {_some(broken)}: the run that wrote it had diverged, or the "
            "file is damaged"
        )


def require_own_tensors(
    content: Mapping[str, Tensor], model: nn.Module, config: RandLoraConfig, adapter_name: str
) -> list[str]:
    """Require all λ and γ of the adapter, and no tensors that its config does not announce.

    Args:
        content: of the file, by the names of ``model``.
        model: the model with the adapter, without wrappers.
        config: the adapter's.
        adapter_name: its name.

    Returns:
        Names of the base model's own tensors that the file brings: trained biases, resized embeddings.

    Raises:
        CheckpointError: naming the tensors that are missing or too many.
    """
    names = {in_base(name): name for name in content}
    wanted = _updates(model, adapter_name)
    missing = [aliases[0] for aliases in wanted if not any(alias in names for alias in aliases)]
    if missing:
        raise CheckpointError(
            f"the file lacks {_some(missing)}: it is damaged, or was made for another model or other targets"
        )
    own = {alias for aliases in wanted for alias in aliases}
    present = {in_base(name) for name in model.state_dict()}
    added = [in_base(name) for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    # With bias="all" PEFT writes the biases of modules_to_save a second time, under names that no model has.
    of_added = {n for n in names if _is_in(n, added) and (adapter_name in n.split(".") or n not in present)}
    rest = [name for name in names if name not in own | of_added]
    base = _base_tensors(model, present, config)
    strange = [name for name in rest if name not in base]
    if strange:
        raise CheckpointError(
            f"the file holds tensors that its config does not announce, or the model does not have: {_some(strange)}; "
            "an adapter brings λ, γ, its bases and the modules that it trains in full, and changes nothing else"
            + (
                f". Of single experts: {SINGLE_EXPERTS}"
                if any(re.search(r"experts\.\d+\.", n) for n in strange)
                else ""
            )
        )
    _warn_of_missing_biases(rest, base, config)
    return [names[name] for name in rest]


def _updates(model: nn.Module, adapter_name: str) -> list[list[str]]:
    """Return the names of each λ and γ; several where a module is at several places."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith((f".{LAMBDA}.{adapter_name}", f".{GAMMA}.{adapter_name}")):
            aliases.setdefault(id(parameter), []).append(in_base(name))
    return list(aliases.values())


def _base_tensors(model: nn.Module, present: set[str], config: RandLoraConfig) -> set[str]:
    """Return the names of tensors of the base model that PEFT writes into an adapter's file, and reads from it."""
    embeddings: list[nn.Module] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):
            embeddings.append(getattr(model, getter)())
    places = [in_base(name) for name, m in model.named_modules() if any(m is found for found in embeddings)]
    inside = [in_base(name) for name in adapted(model)]
    biases = {name for name in present if _is_bias(name) and (config.bias == "all" or _is_in(name, inside))}
    return {name for name in present if _is_in(name, places)} | (set() if config.bias == "none" else biases)


def _warn_of_missing_biases(found: Iterable[str], possible: Iterable[str], config: RandLoraConfig) -> None:
    """Warn if the file lacks biases; modules such as T5's ``relative_attention_bias`` are not biases."""
    if config.bias == "none" or any(_is_bias(name) for name in found):
        return
    if any(_is_bias(name) for name in possible):
        warnings.warn(
            f"the adapter was trained with bias={config.bias!r}, and its file holds no biases: PEFT wrote none before "
            "0.21. Those of the base model stay, and outputs are not those of the trained model.",
            stacklevel=3,
        )


def _is_bias(name: str) -> bool:
    """Return whether PEFT counts a tensor among the biases that it writes."""
    return name == "bias" or name.endswith(".bias")


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _some(names: list[str]) -> str:
    """Return a few of the names, shortened: they come from a stranger's file."""
    shown = ", ".join(ascii(name)[1:-1][:100] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
