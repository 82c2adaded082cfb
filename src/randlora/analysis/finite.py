"""The first layer of a model with a number that is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from randlora.tuner.layers.base import RandLoraLayer, adapted


def first_not_finite(model: nn.Module, *args: Any, **kwargs: Any) -> str | None:
    """Return the name of the first adapted layer, in the order of modules, that has an infinite number or NaN.

    Args:
        model: the model, or any module around adapted layers.
        *args: a batch to call the model with, if its outputs are to be looked at as well.
        **kwargs: likewise.

    Returns:
        What is not finite and where: λ or γ of an adapter, or its gradient; else, given a batch, the output of the
        first layer to be called that makes such an output of an input that is finite. ``None`` if there is none.
        Gradients that a GradScaler has not unscaled yet overflow now and then: it skips that step.
    """
    layers = adapted(model)
    for name, layer in layers.items():
        for what, tensor in _trained(layer):
            if not tensor.isfinite().all():
                return f"{what} in {name}"
    return _first_output(model, layers, args, kwargs) if args or kwargs else None


def _trained(layer: RandLoraLayer) -> Iterator[tuple[str, Tensor]]:
    for symbol, parameters in (("λ", layer.randlora_lambda), ("γ", layer.randlora_gamma)):
        for adapter, parameter in parameters.items():
            yield f"{symbol} of adapter {adapter!r}", parameter
            if parameter.grad is not None:
                yield f"the gradient of {symbol} of adapter {adapter!r}", parameter.grad


def _first_output(
    model: nn.Module, layers: dict[str, RandLoraLayer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    found: list[str] = []

    def look(name: str, layer: RandLoraLayer, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if isinstance(output, Tensor) and not output.isfinite().all() and all(t.isfinite().all() for t in tensors):
            found.append(f"the output of {name} with adapters {', '.join(map(repr, layer.active_adapters))}")

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name, module, inputs, output))
        for name, module in layers.items()
        if isinstance(module, nn.Module)
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
