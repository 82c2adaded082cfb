"""Batches in which each sample has its own adapter: ``model(**batch, adapter_names=["x", "__base__", "y"])``.

For the time of such a call ``calls`` knows the names of every adapted layer and every module of ``modules_to_save``, by
the thread that calls. Nothing of the model changes, so that threads can share it. PEFT's LoRA sends the names by hooks
instead. Threads that add and remove hooks of one module disturb each other (torch may give two hooks one id, or lose
how a hook is to be called), and a compiled module does not see hooks that come later.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import other
from torch import Tensor, nn

from randlora.errors import AdapterNamesError
from randlora.tuner.layers.base import RandLoraLayer
from randlora.tuner.layers.read import rows_have_adapters

BASE = "__base__"
"""Stands for no adapter in ``adapter_names``."""


class Calls:
    """The calls with ``adapter_names`` that run now, of all models.

    Attributes:
        running: whether there are any. It is a plain value, on which compiled code is guarded.
    """

    def __init__(self) -> None:
        self.running = False
        self._of_thread: dict[int, dict[nn.Module, tuple[list[str], int]]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def run(self, names: dict[nn.Module, list[str]], copies: int) -> Iterator[None]:
        """Within this context ``names`` are those of the modules, in this thread only.

        Args:
            names: for each module the names, one for each sample.
            copies: as of :func:`one_adapter_per_sample`.
        """
        thread = threading.get_ident()
        outer = self._of_thread.get(thread, {})
        self._set(thread, outer | {module: (of_module, copies) for module, of_module in names.items()})
        try:
            yield
        finally:
            self._set(thread, outer)

    def names(self, module: nn.Module, rows: int) -> list[str] | None:
        """One name for each row of the input of ``module``, or ``None`` outside of calls of this thread."""
        known = self._of_thread.get(threading.get_ident(), {}).get(module)
        if known is None:
            return None
        names, copies = known
        return [name for name in names for _ in range(copies)] if rows == len(names) * copies else names

    def _set(self, thread: int, names: dict[nn.Module, tuple[list[str], int]]) -> None:
        with self._lock:
            if names:
                self._of_thread[thread] = names
            else:
                self._of_thread.pop(thread, None)
            self.running = bool(self._of_thread)


calls = Calls()


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
    names: dict[nn.Module, list[str]] = {}
    for module in modules:
        if isinstance(module, RandLoraLayer):
            if not module.computes_rows:  # refused unless no row changes it
                continue
            known: Container[str] = module.r
        elif isinstance(module, other.AuxiliaryTrainingWrapper):
            known = module._adapters
            _let_ask(module)
        else:
            continue
        names[module] = [name if name in known else BASE for name in adapter_names]
    with rows_have_adapters(adapter_names), calls.run(names, copies):
        yield


@torch.compiler.disable  # threads that share a compiled model have names of their own
def mixed_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """The output of an adapted layer for rows that belong to different adapters.

    Each adapter's rows go through the layer as if it were the only active one, hence by the same computation.

    Args:
        layer: the adapted layer.
        x: input (batch, ...).
        *args: passed on to the layer.
        **kwargs: likewise.

    Returns:
        The output (batch, ...), or ``None`` if the call in this thread, if any, names no adapters for the layer.

    Raises:
        AdapterNamesError: if the numbers of names and rows differ, or adapters are merged.
    """
    adapter_names = calls.names(layer, len(x))
    if adapter_names is None:
        return None
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


class _Asks(other.AuxiliaryTrainingWrapper):
    """A module of ``modules_to_save`` that asks for the names of its rows, as adapted layers do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_names(*args, **kwargs) if calls.running else super().forward(*args, **kwargs)

    @torch.compiler.disable
    def _with_names(self, *args: Any, **kwargs: Any) -> Any:
        names = calls.names(self, len(args[0])) if args else None
        return super().forward(*args, **kwargs, **({} if names is None else {"adapter_names": names}))


class ModulesToSaveWrapper(_Asks, other.ModulesToSaveWrapper):
    """PEFT's, which asks for names."""


class TrainableTokensWrapper(_Asks, other.TrainableTokensWrapper):
    """PEFT's, which asks for names."""


def _let_ask(wrapper: nn.Module) -> None:
    """Makes a wrapper ask, for good: compiled code is guarded on the class of a module, and not on its hooks.

    Raises:
        AdapterNamesError: for a kind of wrapper that is not known.
    """
    if isinstance(wrapper, _Asks):
        return
    kinds: dict[type, type] = {
        other.ModulesToSaveWrapper: ModulesToSaveWrapper,
        other.TrainableTokensWrapper: TrainableTokensWrapper,
    }
    if type(wrapper) not in kinds:
        raise AdapterNamesError(
            f"adapter_names cannot be used with a {type(wrapper).__name__}: run the adapters one after another, with "
            "`set_adapter`"
        )
    wrapper.__class__ = kinds[type(wrapper)]


def copies_per_sample(kwargs: dict[str, Any], model: nn.Module) -> int:
    """Into how many rows ``generate``, called with ``kwargs``, turns a sample."""
    generation = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    numbers = [kwargs.get(name) or getattr(generation, name, None) for name in ("num_beams", "num_return_sequences")]
    return max([1, *(number for number in numbers if isinstance(number, int))])


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
