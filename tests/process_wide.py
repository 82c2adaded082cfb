"""What a process has one of: global generators and the default dtype."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generators() -> tuple[object, list[bytes], bytes]:
    """States of the generators of Python, numpy and torch, whole: numpy prints its own abridged."""
    numpy = [np.asarray(part).tobytes() for part in np.random.get_state()]
    return random.getstate(), numpy, torch.get_rng_state().numpy().tobytes()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
