"""The launching and the rounding that all kernels share."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

interpreting: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on tensors of the CPU: TRITON_INTERPRET=1 before the first import."""

INTERPRETING = tl.constexpr(interpreting)


def launch(kernel: Any, grid: tuple[int, ...], out: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    """Run ``kernel`` on the device of ``out``, its first argument; Triton itself takes the current device."""
    if out.is_cuda and out.device.index != torch.cuda.current_device():
        with torch.cuda.device(out.device):
            kernel[grid](out, *arguments, **constants)
    else:
        kernel[grid](out, *arguments, **constants)


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
