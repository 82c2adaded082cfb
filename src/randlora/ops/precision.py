"""The dtype of products: autocast's, the input's, or that of their operands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)
"""The dtypes in which W + ΔW keeps small updates."""

_autocasts: dict[str, bool] = {}  # by type of device; plain values, since not every Dynamo traces torch's check


def has_autocast(device_type: str) -> bool:
    """Return whether torch has autocast for devices of that type; it has none for the meta device."""
    if device_type not in _autocasts:
        _autocasts[device_type] = torch.amp.is_autocast_available(device_type)
    return _autocasts[device_type]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast asks for, else that of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if autocasts(kind) and x.dtype != torch.float64 else x.dtype


def autocasts(device_type: str) -> bool:
    """Return whether autocast is on for devices of that type."""
    known = _autocasts.get(device_type)  # one call less where host time decides
    return (has_autocast(device_type) if known is None else known) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context in which products run in the dtype of their operands."""
    if autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # entering autocast takes longer than a small product


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, else ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


has_autocast("cpu")
has_autocast("cuda")
