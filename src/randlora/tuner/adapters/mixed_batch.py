"""Batches in which each sample has its own adapter: ``model(**batch, adapter_names=["x", "__base__", "y"])``.

While such a call runs, the layers ask ``calls`` (``layers/rows.py``) for the names of their rows.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import other
from torch import nn

from randlora.errors import AdapterNamesError
from randlora.tuner.layers.base import RandLoraLayer
from randlora.tuner.layers.rows import BASE, calls


@contextmanager
def one_adapter_per_sample(model: nn.Module, adapter_names: Sequence[str], copies: int) -> Iterator[None]:
    """Let the layers of ``model`` compute row i with adapter ``adapter_names[i]``, in this thread and context.

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
    with calls.run(adapter_names, names, copies):
        yield


class _Asks(other.AuxiliaryTrainingWrapper):
    """A module of ``modules_to_save`` that asks for the names of its rows, as adapted layers do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_names(*args, **kwargs) if calls.running else super().forward(*args, **kwargs)

    @torch.compiler.disable
    def _with_names(self, *args: Any, **kwargs: Any) -> Any:
        names = calls.names(self, len(args[0])) if args else None
        return super().forward(*args, **kwargs, **({} if names is None else {"adapter_names": names}))


class ModulesToSaveWrapper(_Asks, other.ModulesToSaveWrapper):
    """PEFT's wrapper, which asks for names."""


class TrainableTokensWrapper(_Asks, other.TrainableTokensWrapper):
    """PEFT's wrapper, which asks for names."""


def _let_ask(wrapper: nn.Module) -> None:
    """Change a wrapper's class for good: compiled code is guarded on the class of a module, and not on its hooks.

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
    """Return the number of rows that ``generate``, called with ``kwargs``, makes of a sample."""
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
    """Require that weights which serve all rows are the base model's, for rows of other adapters too."""
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
