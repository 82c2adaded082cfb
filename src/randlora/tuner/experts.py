"""Experts and routers that a config names as Transformers 4 named them: linear layers, each expert its own.

Transformers 5 holds the experts of a layer in two stacks and computes routers from a parameter. PEFT finds them for
LoRA alone, by tables of names (`peft.utils.transformers_weight_conversion`), which are read here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any, cast

from peft.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from randlora.errors import ConfigError
from randlora.tuner.config import RandLoraConfig

SINGLE_EXPERTS = (
    "it was trained where each expert is linear layers of its own, as in Transformers 4. Here all experts of a layer "
    "are one parameter, gate and up projection joined: a wider matrix has other bases, and one λ and γ for both, so "
    "that no RandLoRA of it is that update. Merge the adapter with Transformers 4, or train it again"
)
"""Why a file cannot be loaded."""

_Parameters = dict[str, tuple[nn.Module, nn.Parameter]]
_DOWN, _GATE_AND_UP = ("down_proj", "w2"), ("gate_proj", "up_proj", "w1", "w3")


def with_experts(config: RandLoraConfig, model: nn.Module) -> RandLoraConfig:
    """Return ``config`` with the experts and routers that its ``target_modules`` mean as ``target_parameters``.

    ``exclude_modules`` and ``layers_to_transform`` hold for them. The config of an adapter that was saved is returned
    as it is: it says what was adapted. ``config`` itself is never changed.

    Raises:
        ConfigError: if only a part of a stack is named, or dropout is asked for, which experts cannot have; or if the
            saved adapter has single experts only.
    """
    names = former_names(model)
    if config.target_modules is None or not names:
        return config
    if config.settled:
        _require_layers(config, model)
        return config
    targets = set(names) if means_all_layers(config) else config.target_modules
    wanted = _with_targets(config, targets)
    parameters = _parameters(model)
    meant = [path for path, held in parameters.items() if _is_meant(wanted, path, _former(path, names), *held)]
    if not meant:
        return config
    if config.randlora_dropout:
        raise ConfigError(
            f"randlora_dropout={config.randlora_dropout!r} cannot be applied to {_shown(meant)}, which target_modules="
            f"{_readable(config.target_modules)} names and whose update sees no input: set it to 0, or leave the "
            "experts out with `exclude_modules=['experts']`"
        )
    found = copy.copy(config)
    found.target_parameters = sorted({*(config.target_parameters or ()), *_shortest(meant, parameters)})
    if not means_all_layers(config):
        found.target_modules = cast("Any", _other_targets(config, model, {p.rpartition(".")[0] for p in meant}))
    return found


def warn_of_experts_left_out(config: RandLoraConfig, model: nn.Module) -> None:
    """Warn of experts whose projections ``target_modules`` names, or means by "all-linear", and which stay frozen.

    PEFT's LoRA leaves them out too, and does not say so.

    Args:
        config: as :func:`with_experts` returns it.
        model: with the adapter or without it.
    """
    if config.settled or config.target_modules is None:
        return
    own = tuple(f".{name}" for name in config.target_parameters or ())
    parameters = _parameters(model)
    left_out = [path for path in _stacks(parameters) if not f".{path}".endswith(own) and _names_an_expert(config, path)]
    if left_out:
        holders = sorted({path.split(".")[-2] for path in left_out})
        warnings.warn(
            f"target_modules={_readable(config.target_modules)} leaves out {len(left_out)} stacks of experts' weights, "
            f"as PEFT's LoRA does: {_shown(left_out)}. Adapt them with `target_parameters="
            f"{_shortest(left_out, parameters)}`, or say with `exclude_modules={holders}` that they are to stay.",
            stacklevel=2,
        )


def former_names(model: nn.Module) -> dict[str, str]:
    """Return parameters of experts and routers by the names that these had as linear layers."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        return {}
    # part of Transformers' loading, which is no matter of models of other origin
    from peft.utils.transformers_weight_conversion import (  # noqa: PLC0415
        _MODEL_TO_CONVERSION_PATTERN,
        _MOE_TARGET_MODULE_MAPPING,
    )

    return _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), {})


def former_paths(model: nn.Module) -> list[str]:
    """Return the paths that projections of experts would have if experts were layers, by every name in use."""
    stacks = _stacks(_parameters(model))
    holders = [(path.rpartition(".")[0], name) for path in stacks for name in _names_of_projections(path)]
    return [former for holder, name in holders for former in (f"{holder}.{name}", f"{holder}.0.{name}")]


def _parameters(model: nn.Module) -> _Parameters:
    """Return parameters by their paths in the base model, each with the module that holds it."""
    return {
        f"{path}.{name}".replace(".base_layer", ""): (module, parameter)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "randlora_" not in path
    }


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # of what DeepSpeed has partitioned


def _stacks(parameters: _Parameters) -> list[str]:
    """Return the paths of stacks of experts' weights."""
    return [
        path
        for path, (module, parameter) in parameters.items()
        if "expert" in f"{path} {type(module).__name__}".lower() and len(_shape(parameter)) == 3
    ]


def _names_of_projections(path: str) -> tuple[str, ...]:
    name = path.rpartition(".")[2]
    return (name, *(_DOWN if "down" in name else _GATE_AND_UP))


def _former(path: str, names: dict[str, str]) -> list[str]:
    return [former for former, name in names.items() if f".{path}".endswith(f".{name}")]


def _is_meant(config: RandLoraConfig, path: str, former: list[str], module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether ``config`` means this parameter of ``module``, once linear layers of the names ``former``."""
    holder, _, _ = path.rpartition(".")
    if not former or _is_excluded(config, holder):
        return False
    if holder.rpartition(".")[2] in former:  # a router, which has kept its name
        return not isinstance(module, nn.Linear) and bool(check_target_module_exists(config, holder))
    ends = (f"{holder}.0", f"{holder}.{_shape(parameter)[0] - 1}")  # expressions may ask for the experts' numbers
    found = [
        name
        for name in former
        if check_target_module_exists(config, f"{holder}.{name}")
        or all(check_target_module_exists(config, f"{expert}.{name}") for expert in ends)
    ]
    missing = [name for name in former if name not in found]
    if found and missing:
        raise ConfigError(
            f"target_modules={_readable(config.target_modules)} names {', '.join(found)} of {holder!r} without "
            f"{', '.join(missing)}: Transformers 5 holds them in one parameter, {path!r}. Name them all, or leave the "
            "experts out with `exclude_modules=['experts']`"
        )
    return bool(found)


def _require_layers(config: RandLoraConfig, model: nn.Module) -> None:
    paths = [path.replace(".base_layer", "") for path, _ in model.named_modules() if path]
    if config.target_parameters or any(check_target_module_exists(config, path) for path in paths):
        return
    if any(check_target_module_exists(config, path) for path in former_paths(model)):
        raise ConfigError(
            f"the adapter has target_modules={_readable(config.target_modules)}, of which {type(model).__name__} has "
            f"none: {SINGLE_EXPERTS}"
        )


def _names_an_expert(config: RandLoraConfig, path: str) -> bool:
    holder = path.rpartition(".")[0]
    former = [f"{holder}.{name}" for name in _names_of_projections(path)]
    if any(_is_excluded(config, one) for one in (holder, *former)):
        return False
    return means_all_layers(config) or any(check_target_module_exists(config, one) for one in former)


def _is_excluded(config: RandLoraConfig, module: str) -> bool:
    """Return whether the config would not adapt the module, even if it named it."""
    return not check_target_module_exists(_with_targets(config, {module}), module)


def _other_targets(config: RandLoraConfig, model: nn.Module, holders: set[str]) -> set[str] | str:
    """Return ``target_modules`` without routers, and without names that only experts have."""
    paths = {path.replace(".base_layer", "") for path, _ in model.named_modules()} - {""}
    matched = {path for path in paths if check_target_module_exists(config, path)}
    others = matched - holders
    if not others:
        return set()
    if others < matched:
        return _find_minimal_target_modules(others, paths - others)
    if isinstance(config.target_modules, str):
        return config.target_modules
    return {name for name in config.target_modules or () if any(f".{path}".endswith(f".{name}") for path in others)}


def _shortest(paths: list[str], parameters: Iterable[str]) -> list[str]:
    """Return names for ``target_parameters`` that match these and no others, without modules' names where possible."""
    names: set[str] = set()
    for path in paths:
        parts = path.split(".")
        short = ".".join(parts[-2:]) if parts[-1] == "weight" else parts[-1]
        matched = {other for other in parameters if f".{other}".endswith(f".{short}")}
        names.add(short if matched <= set(paths) else path)
    return sorted(names)


def _with_targets(config: RandLoraConfig, targets: Any) -> RandLoraConfig:
    other = copy.copy(config)
    other.target_modules = targets
    return other


def means_all_layers(config: RandLoraConfig) -> bool:
    """Return whether all linear layers are the targets, whatever their names."""
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def _readable(targets: Any) -> str:
    return repr(targets if isinstance(targets, str) else sorted(targets))


def _shown(paths: list[str]) -> str:
    return ", ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")
