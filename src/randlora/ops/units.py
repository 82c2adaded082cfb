"""The unit of B in products of float16, whose numbers end at 65504 and grow coarse below 6e-5.

Entries of B are about 1, so that sums over its M rows or q columns are about √M times their terms, and overflow
float16 early. Entries of Ã = s·λ·A·γ are smaller than the outputs by as much, and underflow. Moving a power of two from
B to Ã costs nothing, and brings both into the range of inputs and outputs: √M is 64 at a width of 4096, and within a
factor of 8 of that for all widths from 64 to 262144.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT16 = 2.0**-6


def unit(dtype: torch.dtype) -> float:
    """Return the factor of B in products of ``dtype``, by which Ã is divided: 1 except in float16."""
    return _FLOAT16 if dtype == torch.float16 else 1.0


def in_units(B: Tensor, dtype: torch.dtype) -> Tensor:
    """Return B times its unit in ``dtype``, rounded once."""
    return B.to(dtype) if unit(dtype) == 1 else (B.float() * unit(dtype)).to(dtype)
