"""Adapted layers that a training step passes over are named at the first one.

A model may hold a layer that it neither calls nor reads: T5's ``shared``, whose weight two other embeddings hold as
well. Its adapter would have no effect and no gradient, and nothing would say so.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from randlora.tuner.layers.base import RandLoraLayer, adapted

_awaiting: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def name_unused_layers(model: nn.Module) -> None:
    """Let the first step of an optimiser of adapters of ``model`` warn of layers without a gradient."""
    _awaiting.add(model)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _awaiting:
        return
    trained = {id(p): p.grad is not None for group in optimizer.param_groups for p in group["params"]}
    if not any(trained.values()):  # some take a step only to make their state
        return
    for model in list(_awaiting):
        layers = adapted(model)
        used = {name: _used(layer, trained) for name, layer in layers.items()}
        if any(value is not None for value in used.values()):
            _awaiting.discard(model)
            _warn(model, {name: layers[name] for name, value in used.items() if value is False})


def _used(layer: RandLoraLayer, trained: dict[int, bool]) -> bool | None:
    """Return whether a gradient has reached the layer's adapters; ``None`` if none of them is trained."""
    held = [
        trained[id(p)] for p in layer.randlora_lambda.values() if p.requires_grad and p.numel() and id(p) in trained
    ]
    return any(held) if held else None


def _warn(model: nn.Module, unused: dict[str, RandLoraLayer]) -> None:
    if not unused:
        return
    name, layer = next(iter(unused.items()))
    weight = layer.original_weight()
    others = [
        path
        for path, module in model.named_modules()
        if path != f"{name}.base_layer" and any(p is weight for p in module._parameters.values())
    ]
    shared = f" The weight of {name!r} is also that of {', '.join(others)}: target those instead." if others else ""
    named = ", ".join(list(unused)[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
    warnings.warn(
        f"the first training step has neither called nor read these adapted layers: {named}. "
        "Their adapters got no gradient. Unless other batches use them, as of experts that no token went to, they have "
        f"no effect: leave them out by `target_modules` or `exclude_modules`.{shared}",
        stacklevel=2,
    )


register_optimizer_step_pre_hook(_before_step)
