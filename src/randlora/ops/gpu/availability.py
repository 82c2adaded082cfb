"""The choice between the GPU's kernels and torch's own operations, and the reasons for the latter."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

_HALF = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, Parameter)
_enabled = True
_found: dict[torch.device, str | None] = {}
_kernels: list[ModuleType] = []


def set_kernels(enabled: bool) -> None:
    """Set whether layers use the Triton kernels where possible.

    The setting is for the process, and on by default. With ``False``, torch's own operations compute all steps.
    """
    global _enabled  # noqa: PLW0603 - a plain global is what torch.compile can guard on
    _enabled = enabled


def enabled() -> bool:
    """Return whether the kernels may be used."""
    return _enabled


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why torch computes all steps in ``dtype`` on ``device``; ``None`` if the kernels do."""
    if not _enabled:
        return "they were switched off by set_kernels(False)"
    if dtype not in _HALF:
        return f"they compute in half precision, not in {str(dtype).removeprefix('torch.')}"
    # an entry that is added later would be a reason to compile again
    return _missing(device) if torch.compiler.is_compiling() else _remembered(device)


def kernels(dtype: torch.dtype, *tensors: Tensor | None) -> ModuleType | None:
    """Return the kernels for products in ``dtype`` if they may be called on ``tensors`` now, else ``None``.

    The first tensor gives the device. A kernel is not an operation of torch: modes, autograd and transforms would not
    see it. Compilers fuse small steps themselves.
    """
    if dtype not in _HALF or torch.compiler.is_compiling():  # cheapest test first
        return None
    if not _enabled or tensors[0] is None or _remembered(tensors[0].device) is not None or _is_recorded():
        return None
    differentiates = torch.is_grad_enabled()
    for tensor in tensors:  # a loop takes half the time of two generators, with few tokens as long as a small product
        if tensor is not None and (type(tensor) not in _PLAIN or (differentiates and tensor.requires_grad)):
            return None
    return loaded()


def loaded() -> ModuleType:
    """Return the module with all kernels. The first call imports Triton."""
    if not _kernels:
        _kernels.append(import_module("randlora.ops.gpu.kernels"))
    return _kernels[0]


def _remembered(device: torch.device) -> str | None:
    if device not in _found:
        _found[device] = _missing(device)
    return _found[device]


def _is_recorded() -> bool:
    """Return whether a transform, a tracer or a dispatch mode (fake tensors, a counter) sees each operation."""
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch._C._get_tracing_state() is not None


@torch.compiler.assume_constant_result
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
