"""Batches in which each sample has its own adapter: ``model(**batch, adapter_names=["x", "__base__", "y"])``.

The names travel as PEFT's LoRA sends them: hooks, there for the time of one call, add them to the arguments of every
adapted layer and every module of ``modules_to_save``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from randlora.errors import AdapterNamesError
from randlora.tuner.layers.base import RandLoraLayer

BASE = "__base__"
"""Stands for no adapter in ``adapter_names``."""


@contextmanager
def one_adapter_per_sample(model: nn.Module, adapter_names: Sequence[str], copies: int) -> Iterator[None]:
    """Within this context the layers of ``model`` compute row i with adapter ``adapter_names[i]``.

    Args:
        model: the model, in evaluation mode.
        adapter_names: one name for each sample, ``"__base__"`` for none.
        copies: into how many rows, next to one another, ``generate`` turns a sample: beams or returned sequences.
            What sees each sample once, such as an encoder, is known by the number of its rows.

    Raises:
        AdapterNamesError: in training mode, or for a name that no layer knows.
    """
    _require_usable(model, adapter_names)
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, RandLoraLayer):
                known = set(module.randlora_lambda)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                known = set(module._adapters)
                undo.enter_context(_heeding_names(module))
            else:
                continue
            hook = _hook([name if name in known else BASE for name in adapter_names], copies)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            undo.callback(handle.remove)
        yield


def mixed_forward(layer: Any, adapter_names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The output of an adapted layer for rows that belong to different adapters.

    Each adapter's rows go through the layer as if it were the only active one, hence by the same computation.

    Args:
        layer: the adapted layer.
        adapter_names: one name for each row of ``x``.
        x: input (batch, ...).
        *args: passed on to the layer.
        **kwargs: likewise.

    Raises:
        AdapterNamesError: if the numbers of names and rows differ, or adapters are merged.
    """
    if len(adapter_names) != len(x):
        raise AdapterNamesError(
            f"adapter_names has {len(adapter_names)} names for {len(x)} inputs of a layer: give one name for each "
            f"sample, {BASE!r} for none. (A layer whose input is not one row or sequence for each sample cannot be "
            "used so.)"
        )
    if layer.merged:
        raise AdapterNamesError(
            f"adapter_names cannot be used while {', '.join(layer.merged_adapters)} is merged: call "
            "`unmerge_adapter()` first"
        )
    active = layer._active_adapter
    result: Tensor | None = None
    try:
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            layer._active_adapter = [] if name == BASE else [name]
            part = layer.forward(x.index_select(0, rows), *args, **kwargs)
            if result is None:
                result = part.new_empty(len(x), *part.shape[1:])
            result = result.index_copy(0, rows, part)
    finally:
        layer._active_adapter = active
    return layer.base_layer(x, *args, **kwargs) if result is None else result


def copies_per_sample(kwargs: dict[str, Any], model: nn.Module) -> int:
    """Into how many rows ``generate``, called with ``kwargs``, turns a sample."""
    generation = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    numbers = [kwargs.get(name) or getattr(generation, name, None) for name in ("num_beams", "num_return_sequences")]
    return max([1, *(number for number in numbers if isinstance(number, int))])


def _hook(names: list[str], copies: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    repeated = [name for name in names for _ in range(copies)]

    def add_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = len(args[0]) if args else len(names)
        return args, {**kwargs, "adapter_names": repeated if rows == len(repeated) else names}

    return add_names


@contextmanager
def _heeding_names(wrapper: AuxiliaryTrainingWrapper) -> Iterator[None]:
    """PEFT's wrapper looks at the names only while its active adapter has a module of its own."""
    active = wrapper._active_adapter
    wrapper._active_adapter = sorted(wrapper._adapters)[:1]
    try:
        yield
    finally:
        wrapper._active_adapter = active


def _require_usable(model: nn.Module, adapter_names: Sequence[str]) -> None:
    if model.training:
        raise AdapterNamesError("adapter_names cannot be used in training mode: call `model.eval()` first")
    if isinstance(adapter_names, str):
        raise AdapterNamesError(f"adapter_names={adapter_names!r} must be a list with one name for each sample")
    for path, module in model.named_modules():
        if isinstance(module, RandLoraLayer) and not module.computes_rows and set(adapter_names) & set(module.r):
            raise AdapterNamesError(
                f"adapter_names cannot be used with an adapter of {path!r}: its module has one weight for all "
                "samples. Run the adapters one after another, with `set_adapter`"
            )
    known = {name for m in model.modules() if isinstance(m, RandLoraLayer) for name in m.randlora_lambda}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise AdapterNamesError(
            f"adapter_names has {', '.join(map(repr, unknown))}, but the adapters of the model are "
            f"{', '.join(map(repr, sorted(known)))}; {BASE!r} stands for none"
        )
