"""Where the GPU's kernels run, and why not where they do not: the one place that chooses."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from randlora.ops.gpu import reference

_HALF = (torch.bfloat16, torch.float16)
_enabled = True
_found: dict[torch.device, str | None] = {}  # plain values, asked for before a compiler traces
_operators: list[ModuleType] = []


def set_kernels(enabled: bool) -> None:
    """Whether layers use the Triton kernels where they can; on unless set, for the process.

    Off, products are torch's own, and a second copy of the bases is made on the device if kernels have run before.
    """
    global _enabled  # noqa: PLW0603 - a plain global is what torch.compile can guard on
    _enabled = enabled


def enabled() -> bool:
    """Return whether the kernels may be used."""
    return _enabled


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products in ``dtype`` on ``device`` are torch's own; ``None`` where the kernels run."""
    if not _enabled:
        return "they were switched off by set_kernels(False)"
    if dtype not in _HALF:
        return f"they compute in half precision, not in {str(dtype).removeprefix('torch.')}"
    if device not in _found:
        _found[device] = _missing(device)
    return _found[device]


def kernels(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module with the products of grouped bases. Triton is imported by the first call that needs it."""
    if why_not(device, dtype):
        return reference
    if not _operators:
        _operators.append(import_module("randlora.ops.gpu.operators"))
    return _operators[0]


def _missing(device: torch.device) -> str | None:
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted:
        if device.type != "cuda":
            return f"there are none for devices of type {device.type}"
        if torch.version.hip is not None:
            return "they are not tested on ROCm"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "they need bf16 matrix units: compute capability 8.0 or newer"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None
