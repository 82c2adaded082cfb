"""The launching and the rounding that all kernels share."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl

interpreting: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on tensors of the CPU: TRITON_INTERPRET=1 before the first import."""

INTERPRETING = tl.constexpr(interpreting)
_MOST = 4096  # kept kernels; strides of some inputs depend on the number of tokens
_LOW_BITS = 255  # of an address; those of torch are zero, but for views
_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


class Constants:
    """The constants of a kernel and options of its compiler, by name; compared as an object.

    Args:
        values: of a block and its options.
        small: values in the interpreter, so that small tensors have several blocks.

    Attributes:
        values: those that are used.
        rows: of a block.
        columns: of a block.
    """

    def __init__(self, values: dict[str, Any], small: dict[str, Any]) -> None:
        self.values = small if interpreting else values
        self.rows: int = self.values.get("ROWS", 1)
        self.columns: int = self.values["COLUMNS"]


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor | None, ...],
    sizes: tuple[int, ...],
    constants: Constants,
    rows: tuple[int, ...] = (),
) -> None:
    """Run ``kernel`` on the device of its first tensor; Triton itself takes the current device.

    The kernel's parameters are the ``tensors``, then ``rows``, which Triton must not specialise on, then ``sizes``, and
    the constants. A kernel that Triton compiled for such arguments runs past Triton's own search, which takes longer
    than a launch. All that Triton may specialise on or refuse is compared: dtypes, devices, sizes, constants; and
    addresses, which all have to be aligned.
    """
    if interpreting:
        kernel[grid](*tensors, *rows, *sizes, **constants.values)
        return
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, sizes, constants, rows)
        return
    # Triton asks the driver about each tensor, but takes an address as it is
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    places = [None if tensor is None else (tensor.dtype, tensor.get_device()) for tensor in tensors]
    key = (kernel.fn, constants, sizes, *places)
    aligned = not any(address & _LOW_BITS for address in addresses if address)
    found = _compiled.get(key) if aligned else None
    if found is not None:
        compiled, values = found
        compiled[grid](*addresses, *rows, *sizes, *values)
    else:
        compiled = kernel[grid](*tensors, *rows, *sizes, **constants.values)
        if aligned:
            _keep(key, compiled, kernel.arg_names, constants)


def _keep(key: Hashable, compiled: Any, names: list[str], constants: Constants) -> None:
    if len(_compiled) >= _MOST:
        _compiled.clear()
    _compiled[key] = compiled, tuple(constants.values[name] for name in names if name in constants.values)


def blocks(size: int, block: int) -> int:
    """Return the number of blocks that cover ``size``; ``triton.cdiv`` takes as long as a launch."""
    return -(-size // block)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 ``values`` in ``dtype``, rounded to nearest."""
    if INTERPRETING and dtype == tl.bfloat16:  # the interpreter cuts bits off
        bits = values.to(tl.uint32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(dtype)
