"""The update of a weight by an adapter."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor

from randlora.errors import ConfigError


def delta_weight(model: PeftModel, module: str, adapter: str = "default") -> Tensor:
    """Return ΔW of one adapted module of a PEFT model, of any additive method, in float32.

    Args:
        model: the model.
        module: name of the module within the base model.
        adapter: name of the adapter.

    Raises:
        ConfigError: if the module carries no such adapter.
    """
    layer = dict(model.get_base_model().named_modules()).get(module)
    if layer is None or not hasattr(layer, "get_delta_weight"):
        raise ConfigError(f"{module!r} is not an adapted module of the model")
    with torch.no_grad():
        return layer.get_delta_weight(adapter).float()


def singular_values(update: Tensor) -> Tensor:
    """Return the singular values of an update (out, in), largest first, computed in float64."""
    return torch.linalg.svdvals(update.double())


def numerical_rank(values: Tensor) -> int:
    """Return the number of singular values above the rounding of float32."""
    return int((values > values.max() * len(values) * torch.finfo(torch.float32).eps).sum())


def effective_rank(values: Tensor, counts: Tensor | None = None) -> float:
    """Return the exponential of the entropy of the singular values' shares (Roy & Vetterli, 2007); 0 for no update.

    A matrix with k equal singular values, and no others, has k.

    Args:
        values: (k,).
        counts: for how many values each of them stands; by default for itself.
    """
    values = values.double()
    counts = torch.ones_like(values) if counts is None else counts
    total = (counts * values).sum()
    if total == 0:
        return 0.0
    return float((counts * torch.special.entr(values / total)).sum().exp())
