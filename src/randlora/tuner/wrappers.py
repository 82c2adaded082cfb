"""Models without the wrappers of their modules. This file alone knows which wrappers there are, and their names.

``torch.compile``, activation checkpointing, FSDP, DDP and averaging put a step into the names of all that is inside.
Some of them take it out of ``state_dict()`` again, others out of ``named_parameters()``. Files hold plain names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from randlora.tuner.files.format import PREFIX

_STEPS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""The names under which wrappers hold their inner modules; no other modules have such names."""
_PARALLEL = (DataParallel, DistributedDataParallel, AveragedModel)
_OF_PARALLEL = "module"

T = TypeVar("T")


def step_into(module: nn.Module) -> str | None:
    """Return the name under which ``module`` holds the module that it wraps, if it is a wrapper."""
    for step in _STEPS:
        if module._modules.get(step) is not None:
            return step
    return _OF_PARALLEL if isinstance(module, _PARALLEL) else None


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the innermost module that ``module`` wraps, or ``module`` itself."""
    while (step := step_into(module)) is not None:
        module = getattr(module, step)
    return module


def without_steps(name: str) -> str:
    """Return ``name`` without the steps of wrappers; ``plain_name`` knows more, where there is a model."""
    return ".".join(part for part in name.split(".") if part not in _STEPS)


def plain_name(model: nn.Module, name: str) -> str:
    """Return the name that a module or tensor of ``model`` has without wrappers.

    ``name`` may be of the same model wrapped otherwise: by ``state_dict()`` of a compiled one, for instance.
    """
    root = unwrapped(model)
    prefix = PREFIX if name.startswith(PREFIX) and "base_model" not in root._modules else ""
    kept: list[str] = []
    at: nn.Module | None = model
    for part in name.removeprefix(prefix).split("."):
        at, is_step = _past_wrappers(at, part)
        foreign = part == _OF_PARALLEL and at is not None and not _has(at, part)
        if is_step or foreign or part in _STEPS:
            continue
        kept.append(part)
        at = at._modules.get(part) if at is not None else None
    return prefix + ".".join(kept)


def plain_names(model: nn.Module, content: Mapping[str, T]) -> dict[str, T]:
    """Return ``content`` of ``model``, or of the same model wrapped otherwise, by plain names."""
    steps = (*_STEPS, f"{_OF_PARALLEL}.")
    if not any(step in name for name in content for step in steps) and not is_wrapped(model):
        return dict(content)
    return {plain_name(model, name): value for name, value in content.items()}


def plain_view(model: nn.Module) -> Any:
    """Return a view of ``model`` without wrappers, which shares all tensors; ``model`` itself, if it has none.

    What has wrappers in it is a shallow copy, the model itself stays as it is. The state of the view is loaded into,
    and taken from, the model with its wrappers, some of which gather it, by plain names.
    """
    if not is_wrapped(model):
        return model
    whole = _unwrapped_tree(model, {})
    view = _copy_with(whole, whole._modules)  # of its own, whatever else the model is part of
    view.__dict__ |= {"state_dict": _state_dict_of(model), "load_state_dict": _load_state_dict_of(model)}
    return view


def names_to_load(model: nn.Module, content: Mapping[str, T]) -> dict[str, T]:
    """Return ``content`` of plain names, by the names that ``model.load_state_dict`` takes."""
    if not is_wrapped(model):
        return dict(content)
    names = {plain_name(model, name): name for name in model.state_dict()}
    return {names.get(name, name): value for name, value in content.items()}


def names_in_tree(model: nn.Module, content: Mapping[str, T]) -> dict[str, T]:
    """Return ``content`` by the names of modules in ``named_modules()`` of ``model``, wrappers included."""
    if not is_wrapped(model):
        return dict(content)
    paths = {plain_name(model, path): path for path, _ in model.named_modules(remove_duplicate=False)}  # innermost last
    renamed = {}
    for name, value in plain_names(model, content).items():
        owner, inside = name, ""
        while owner not in paths:
            owner, _, part = owner.rpartition(".")
            inside = f".{part}{inside}"
        renamed[(paths[owner] + inside).lstrip(".")] = value
    return renamed


def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` into ``parent`` under ``name``."""
    setattr(parent, name, module)
    renew(parent)


def renew(module: nn.Module) -> None:
    """Let a compiled module run the module that it wraps now, not the one that it wrapped when it was made."""
    if "_orig_mod" in module._modules:
        cast("Any", module)._initialize()


def _past_wrappers(at: nn.Module | None, part: str) -> tuple[nn.Module | None, bool]:
    """Return the module at which a name goes on from ``at``, and whether its ``part`` was a wrapper's step."""
    while at is not None and (step := step_into(at)) is not None:
        at = getattr(at, step)
        if part == step:
            return at, True
    return at, False


def _has(module: nn.Module, name: str) -> bool:
    return any(name in held for held in (module._modules, module._parameters, module._buffers))


def is_wrapped(model: nn.Module) -> bool:
    """Return whether ``model`` is a wrapper, or has one in it."""
    return any(step_into(module) is not None for module in model.modules())


def _unwrapped_tree(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Return ``module`` without wrappers: itself, or a shallow copy that holds its children without wrappers."""
    inner = unwrapped(module)
    if id(inner) not in made:
        children = {
            name: None if child is None else _unwrapped_tree(child, made) for name, child in inner._modules.items()
        }
        same = all(children[name] is child for name, child in inner._modules.items())
        made[id(inner)] = inner if same else _copy_with(inner, children)
    return made[id(inner)]


def _copy_with(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__ = module.__dict__ | {"_modules": children}
    return copy


def _state_dict_of(model: nn.Module) -> Callable[..., dict[str, Any]]:
    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return plain_names(model, model.state_dict(*args, **kwargs))

    return state_dict


def _load_state_dict_of(model: nn.Module) -> Callable[..., Any]:
    def load_state_dict(content: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = model.load_state_dict(names_to_load(model, content), *args, **kwargs)
        plain = {group: [plain_name(model, n) for n in names] for group, names in result._asdict().items()}
        return result._replace(**plain)

    return load_state_dict
