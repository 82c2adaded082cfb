"""The launching and the rounding that all kernels share."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import torch
import triton
import triton.language as tl

interpreting: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on tensors of the CPU: TRITON_INTERPRET=1 before the first import."""

INTERPRETING = tl.constexpr(interpreting)


_MOST = 4096  # kept kernels; strides of some inputs depend on the number of tokens
_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor | None, ...],
    sizes: tuple[int, ...],
    constants: dict[str, Any],
    rows: tuple[int, ...] = (),
) -> None:
    """Run ``kernel`` on the device of its first tensor; Triton itself takes the current device.

    The kernel's parameters are the ``tensors``, then ``rows``, which Triton must not specialise on, then ``sizes``, and
    the ``constants``, which may also hold options of the compiler.
    """
    device = cast("torch.Tensor", tensors[0]).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, tensors, (*rows, *sizes), sizes, constants)
    else:
        _launch(kernel, grid, tensors, (*rows, *sizes), sizes, constants)


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[int, ...],
    sizes: tuple[int, ...],
    constants: dict[str, Any],
) -> None:
    """Run the kernel that Triton compiled for such arguments, past its own search, which takes longer than a launch.

    All that Triton may specialise on or refuse is compared: dtypes, devices, addresses' alignment, sizes, constants.
    """
    if interpreting:
        kernel[grid](*tensors, *numbers, **constants)
        return
    key: list[Hashable] = [kernel.fn, sizes, *constants.values()]
    addresses: list[int | None] = []  # Triton asks the driver about each tensor, but takes an address as it is
    for tensor in tensors:
        address = None if tensor is None else tensor.data_ptr()
        addresses.append(address)
        key += (None,) if tensor is None or address is None else (tensor.dtype, tensor.get_device(), address & 255)
    found = _compiled.get(tuple(key))
    if found is not None:
        compiled, values = found
        compiled[grid](*addresses, *numbers, *values)
        return
    if len(_compiled) >= _MOST:
        _compiled.clear()
    compiled = kernel[grid](*tensors, *numbers, **constants)
    _compiled[tuple(key)] = compiled, tuple(constants[name] for name in kernel.arg_names if name in constants)


def block(sizes: dict[str, int], small: dict[str, int]) -> dict[str, int]:
    """Return the ``sizes`` of a block; in the interpreter ``small`` ones, so that small tensors have several blocks."""
    return small if interpreting else sizes


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 ``values`` in ``dtype``, rounded to nearest."""
    if INTERPRETING and dtype == tl.bfloat16:  # the interpreter cuts bits off
        bits = values.to(tl.uint32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(dtype)


def blocks(size: int, block: int) -> int:
    """Return the number of blocks that cover ``size``; ``triton.cdiv`` takes as long as a launch."""
    return -(-size // block)
