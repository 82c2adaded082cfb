"""Ternary numbers, four to a byte: a sixteenth of float32.

Each row takes whole bytes. A byte holds −1, 0 and 1 as 0, 1 and 2, two bits each, the first number in the lowest bits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from randlora.ops.units import in_units

_PER_BYTE = 4
_AS_ONE = {1: torch.int32, 2: torch.int64, 4: torch.complex128}
"""Dtypes in which four numbers are copied as one, several times faster, by the size of a number in bytes."""


def bytes_of(columns: int) -> int:
    """Return the number of bytes for a row of so many numbers."""
    return -(-columns // _PER_BYTE)


def pack(codes: Tensor) -> Tensor:
    """Return the numbers −1, 0 and 1 in ``codes`` (rows, columns), int8, as bytes (rows, ⌈columns / 4⌉), uint8."""
    filled = F.pad(codes + 1, (0, -codes.shape[1] % _PER_BYTE)).to(torch.uint8)
    first, second, third, fourth = (filled[:, place::_PER_BYTE] for place in range(_PER_BYTE))
    return first | second << 2 | third << 4 | fourth << 6


def unpack(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the first ``columns`` numbers of each row of ``packed`` (..., bytes), in ``dtype`` and its unit."""
    return torch.ops.randlora.unpack(packed, columns, dtype)


torch.library.define("randlora::unpack", "(Tensor packed, int columns, ScalarType dtype) -> Tensor")


@torch.library.impl("randlora::unpack", "CompositeExplicitAutograd")
def _unpack(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    used = packed[..., : bytes_of(columns)]
    numbers = _table(dtype, packed.device).index_select(0, used.flatten().int()).view(dtype)
    return numbers.view(*used.shape[:-1], used.shape[-1] * _PER_BYTE)[..., :columns]


@torch.library.register_fake("randlora::unpack")
def _(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    filled = bytes_of(columns) * _PER_BYTE
    return packed.new_empty(*packed.shape[:-1], filled, dtype=dtype)[..., :columns]


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the four numbers of each byte, side by side."""
    with torch.inference_mode(False):
        shifts = 2 * torch.arange(_PER_BYTE, device=device)
        numbers = in_units((torch.arange(256, device=device).unsqueeze(1) >> shifts & 3) - 1, dtype)  # (256, 4)
        as_one = _AS_ONE.get(dtype.itemsize)
        return numbers if as_one is None else numbers.view(as_one).view(-1)
