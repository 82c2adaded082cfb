"""Names in a config that match nothing in the model: a slip, or names of another model."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from peft import TaskType
from torch import nn

from randlora.tuner.config import RandLoraConfig
from randlora.tuner.experts import former_names, former_paths, means_all_layers
from randlora.tuner.layers.base import adapted

_OF_PEFT = (
    "The following (rank|alpha)_pattern keys did not match",  # said of keys that match parameters too
    "You have passed exclude_modules=.* but no modules were excluded",
    "target_(modules|parameters)=.* were set but no",
)
_HEADS = {
    TaskType.SEQ_CLS: {"classifier", "score"},
    TaskType.TOKEN_CLS: {"classifier", "score"},
    TaskType.QUESTION_ANS: {"qa_outputs"},
}
"""Names that PEFT adds to ``modules_to_save``, whether the model has them or not."""


@contextmanager
def instead_of_peft_warnings(config: RandLoraConfig) -> Iterator[None]:
    """Silence PEFT's warnings of fields that match nothing: :func:`warn_of_unmatched` checks each name."""
    if not (config.rank_pattern or config.alpha_pattern or config.exclude_modules or config.target_parameters):
        yield
        return
    with warnings.catch_warnings():
        for message in _OF_PEFT:
            warnings.filterwarnings("ignore", message=message)
        yield


def warn_of_unmatched(config: RandLoraConfig, model: nn.Module, adapter_name: str) -> None:
    """Warn of each name and each index that matches nothing, with the names nearest to it.

    The config of an adapter that was saved is taken as it is. So are names that no user has given: the usual targets of
    an architecture, and heads that PEFT adds.

    Args:
        config: as the user gave it.
        model: with the adapter.
        adapter_name: its name.
    """
    if config.settled:
        return
    modules = _own_paths(path for path, _ in model.named_modules())
    parameters = _own_paths(path for path, _ in model.named_parameters())
    layers = [*modules, *former_paths(model)]
    adapted = _adapted(model, adapter_name)
    heads = _HEADS.get(config.task_type, set())  # type: ignore[call-overload]
    faults = [
        *_unmatched("target_modules", None if means_all_layers(config) else config.target_modules, layers),
        *_unmatched("exclude_modules", config.exclude_modules, layers),
        *_unmatched("target_parameters", config.target_parameters, parameters),
        *_unmatched("modules_to_save", set(config.modules_to_save or ()) - heads, modules, _ends),
        *_unmatched("rank_pattern", set(config.rank_pattern), adapted, _is_key),
        *_unmatched("alpha_pattern", set(config.alpha_pattern), adapted, _is_key),
        *_layers_not_there(config, adapted),
    ]
    if faults:
        renamed = former_names(model)
        hints = [f" (now {renamed[name]!r})" if name in renamed else _near(name, paths) for _, name, paths in faults]
        listed = [f"{field}: {name!r}{hint}" for (field, name, _), hint in zip(faults, hints, strict=True)]
        warnings.warn(
            f"the config of the adapter {adapter_name!r} has names that match nothing in {type(model).__name__} and "
            f"have no effect: {', '.join(listed)}",
            stacklevel=2,
        )


_Fault = tuple[str, str, list[str]]  # field, name, paths that it might have been meant for


def _unmatched(
    field: str,
    names: Iterable[str] | str | None,
    paths: list[str],
    matches: Callable[[str, str], bool] | None = None,
) -> list[_Fault]:
    matches = matches or (_is_expression if isinstance(names, str) else _is_end)
    given = [names] if isinstance(names, str) else sorted(names or ())
    return [(field, name, paths) for name in given if not any(matches(name, path) for path in paths)]


def _is_end(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _ends(name: str, path: str) -> bool:
    return path.endswith(name)


def _is_expression(name: str, path: str) -> bool:
    return re.fullmatch(name, path) is not None


def _is_key(name: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({name})$", path) is not None


def _layers_not_there(config: RandLoraConfig, adapted: list[str]) -> list[_Fault]:
    wanted = config.layers_to_transform
    indices = [wanted] if isinstance(wanted, int) else wanted or []
    there = {part for path in adapted for part in path.split(".")}
    return [("layers_to_transform", str(index), []) for index in indices if str(index) not in there]


def _adapted(model: nn.Module, adapter_name: str) -> list[str]:
    """Return the paths of adapted modules and parameters."""
    return [
        _plain(path) + (f".{layer.parameter_name}" if layer.adapts_parameter else "")
        for path, layer in adapted(model, adapter_name).items()
    ]


def _own_paths(paths: Iterable[str]) -> list[str]:
    """Return the paths in the base model, without those of adapters' own parts."""
    return [_plain(path) for path in paths if path and "randlora_" not in path and ".modules_to_save." not in path]


def _plain(path: str) -> str:
    return path.replace(".base_layer", "").replace(".original_module", "")


def _near(name: str, paths: list[str]) -> str:
    """Return names like ``name``, of as many parts."""
    count = name.count(".") + 1
    ends = {".".join(path.split(".")[-count:]) for path in paths}
    near = difflib.get_close_matches(name, sorted(end for end in ends if not end.isdigit()), n=2, cutoff=0.85)
    return f" (is it {' or '.join(map(repr, near))}?)" if near else ""
