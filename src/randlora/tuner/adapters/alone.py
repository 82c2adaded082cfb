"""One adapter of a model, as if it had no others.

PEFT adds, loads and saves an adapter in many walks over all parameters of the model, most of them other adapters' where
there are hundreds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from randlora.tuner.layers.base import RandLoraLayer, adapted


@contextmanager
def alone(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Hide λ and γ of all adapters but one from the adapted layers of ``model``, within the context.

    Other adapters cannot be used meanwhile. Afterwards they are there again, in the same order, also after an error.
    """
    layers = adapted(model).values()
    holders: list[Any] = [held for x in layers for held in (x.randlora_lambda, x.randlora_gamma)]
    whole = [(held._keys, held._parameters) for held in holders]
    # with `pop` and `update`, as ParameterDict has them, all this would take longer than the walks
    for held in holders:
        held._keys, held._parameters = _only(held._keys, adapter_name), _only(held._parameters, adapter_name)
    try:
        yield
    finally:
        for held, (keys, parameters) in zip(holders, whole, strict=True):
            held._keys, held._parameters = (
                _with(keys, held._keys, adapter_name),
                _with(parameters, held._parameters, adapter_name),
            )


def without_others(state_dict: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Return ``state_dict`` of a model without λ and γ of other adapters; the model stays whole, for threads."""
    groups = tuple(f".{group}" for group in RandLoraLayer.adapter_layer_names)

    def is_of_another(key: str) -> bool:
        owner, _, name = key.rpartition(".")
        return name != adapter_name and owner.endswith(groups)

    return {key: value for key, value in state_dict.items() if not is_of_another(key)}


def _only(entries: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: entries[name]} if name in entries else {}


def _with(entries: dict[str, Any], changed: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in changed:
        entries.pop(name, None)
    entries.update(changed)
    return entries
