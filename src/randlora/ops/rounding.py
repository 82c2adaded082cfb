"""Stochastic rounding of W + ΔW to bfloat16, which keeps small updates on average: opt-in.

Rounded to nearest, W + ΔW in bfloat16 is W wherever ΔW is under half an ulp. Rounded up with the probability of its
place between its two neighbours, the sum is right on average, and one product with W + ΔW replaces two. The noise of
a single call is as large as bfloat16's own rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from randlora.ops.gpu import availability

_stochastic = False


def set_stochastic_rounding(enabled: bool) -> None:
    """Set whether training on a bfloat16 base may form W + ΔW, rounded stochastically, where that is cheaper.

    The setting is for the process, and off by default: W and ΔW are then separate products whose sum is rounded once.
    """
    global _stochastic  # noqa: PLW0603 - a plain global is what torch.compile can guard on
    _stochastic = enabled


def is_enabled() -> bool:
    """Return whether stochastic rounding was asked for."""
    return _stochastic


def is_stochastic(compute: torch.dtype, weight: torch.dtype) -> bool:
    """Return whether W + ΔW is to be rounded stochastically."""
    return _stochastic and compute == weight == torch.bfloat16


def new_seed(device: torch.device) -> Tensor:
    """Return a seed of shape (1,), int32, drawn on ``device``, so that replayed CUDA graphs draw new seeds."""
    return torch.randint(2**31 - 1, (1,), dtype=torch.int32, device=device)


def stochastic_sum(update: Tensor, base: Tensor, seed: Tensor) -> Tensor:
    """Return ``update + base`` (i, j), rounded stochastically to bfloat16."""
    kernels = availability.kernels(torch.bfloat16, update, base, seed)
    if kernels is not None:
        return kernels.stochastic_sum(update, base, seed)
    return stochastic(update.float() + base.float(), seed)


def stochastic(total: Tensor, seed: Tensor) -> Tensor:
    """Return the float32 ``total`` (i, j) in bfloat16, each entry one of its two neighbours and right on average.

    Random bits are a hash of the entry's number in row-major order and of the ``seed``. They are added to the bits that
    bfloat16 lacks, and carry into the others with the probability of the value's place between its neighbours.
    """
    counter = torch.arange(total.numel(), device=total.device).view(total.shape)
    noise = _mixed(_mixed(counter) ^ seed.long()) & 0xFFFF
    bits = (total.contiguous().view(torch.int32).long() + noise) & 0xFFFF0000
    return bits.to(torch.int32).view(torch.float32).bfloat16()


def _mixed(x: Tensor) -> Tensor:
    """Return MurmurHash3's finaliser of 32-bit numbers, in int64, where the low bits of products are the same."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
