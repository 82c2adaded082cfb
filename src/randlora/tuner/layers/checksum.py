"""A checksum of a weight's bits, to find out whether it was changed."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int | None:
    """Return a number that changes with the bits and the order of rows; ``None`` if bits cannot be read."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.dtype.itemsize not in _INTEGERS:
        return None
    with torch.no_grad():
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.dtype.itemsize])
        rows = bits.reshape(len(bits), -1).sum(1, dtype=torch.int64) if bits.ndim else bits.reshape(1).long()
        return int((rows * torch.arange(1, 1 + len(rows), device=rows.device)).sum())
