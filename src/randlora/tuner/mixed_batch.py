"""Batches in which each sample has its own adapter: ``model(**batch, adapter_names=["x", "__base__", "y"])``.

The names travel as PEFT's LoRA sends them: hooks, there for the time of one call, add them to the arguments of every
adapted layer and every module of ``modules_to_save``. They act in the thread of that call alone, and nothing
else of the model changes, so that threads can share a model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from randlora.errors import AdapterNamesError
from randlora.tuner.layers.base import RandLoraLayer
from randlora.tuner.layers.read import rows_have_adapters

BASE = "__base__"
"""Stands for no adapter in ``adapter_names``."""


@contextmanager
def one_adapter_per_sample(model: nn.Module, adapter_names: Sequence[str], copies: int) -> Iterator[None]:
    """Within this context the layers of ``model`` compute row i with adapter ``adapter_names[i]``, in this thread only.

    Args:
        model: the model, in evaluation mode.
        adapter_names: one name for each sample, ``"__base__"`` for none.
        copies: into how many rows, next to one another, ``generate`` turns a sample: beams or returned sequences.
            What sees each sample once, such as an encoder, is known by the number of its rows.

    Raises:
        AdapterNamesError: in training mode, for a name that no layer knows, or where one weight serves all rows.
    """
    modules = list(model.modules())
    _require_usable(model, modules, adapter_names)
    with ExitStack() as undo:
        undo.enter_context(rows_have_adapters(adapter_names))
        for module in modules:
            if isinstance(module, RandLoraLayer):
                if not module.computes_rows:  # refused unless no row changes it
                    continue
                known: Container[str] = module.r
            elif isinstance(module, AuxiliaryTrainingWrapper):
                known = module._adapters
            else:
                continue
            hook = _hook([name if name in known else BASE for name in adapter_names], copies)
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
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
    result: Tensor | None = None
    for name in dict.fromkeys(adapter_names):
        rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
        part = layer.forward_with([] if name == BASE else [name], x.index_select(0, rows), *args, **kwargs)
        if result is None:
            result = part.new_empty(len(x), *part.shape[1:])
        result = result.index_copy(0, rows, part)
    return layer.base_layer(x, *args, **kwargs) if result is None else result


def copies_per_sample(kwargs: dict[str, Any], model: nn.Module) -> int:
    """Into how many rows ``generate``, called with ``kwargs``, turns a sample."""
    generation = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    numbers = [kwargs.get(name) or getattr(generation, name, None) for name in ("num_beams", "num_return_sequences")]
    return max([1, *(number for number in numbers if isinstance(number, int))])


def _hook(names: list[str], copies: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    repeated = [name for name in names for _ in range(copies)]
    owner = threading.get_ident()

    def add_names(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        # a call of another thread has its own names or none; a compiled model is traced with these
        if not torch.compiler.is_compiling() and threading.get_ident() != owner:
            return None
        rows = len(args[0]) if args else len(names)
        return args, {**kwargs, "adapter_names": repeated if rows == len(repeated) else names}

    return add_names


def _require_usable(model: nn.Module, modules: list[nn.Module], adapter_names: Sequence[str]) -> None:
    if model.training:
        raise AdapterNamesError("adapter_names cannot be used in training mode: call `model.eval()` first")
    if isinstance(adapter_names, str):
        raise AdapterNamesError(f"adapter_names={adapter_names!r} must be a list with one name for each sample")
    layers = [module for module in modules if isinstance(module, RandLoraLayer)]
    _require_rows(model, layers, adapter_names)
    unknown = sorted({name for name in adapter_names if not any(name in layer.r for layer in layers)} - {BASE})
    if unknown:
        known = sorted({name for layer in layers for name in layer.r})
        raise AdapterNamesError(
            f"adapter_names has {', '.join(map(repr, unknown))}, but the adapters of the model are "
            f"{', '.join(map(repr, known))}; {BASE!r} stands for none"
        )


def _require_rows(model: nn.Module, layers: Sequence[RandLoraLayer], adapter_names: Sequence[str]) -> None:
    """A weight that serves all rows must be that of the base model, for rows of other adapters too."""
    for layer in layers:
        if layer.computes_rows or layer.disable_adapters:
            continue
        shaping = [*adapter_names, *layer.merged_adapters, *layer.active_adapters]
        changing = sorted({name for name in shaping if name in layer.r})
        if changing:
            path = next(path for path, module in model.named_modules() if module is layer)
            raise AdapterNamesError(
                f"adapter_names cannot be used while {', '.join(map(repr, changing))} is named or active and adapts "
                f"{path!r}: its module has one weight for all samples. Run the adapters one after another, with "
                "`set_adapter`"
            )
