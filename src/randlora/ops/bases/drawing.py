"""Random numbers of a fixed definition: MT19937 words, exact arithmetic, one rounding.

``docs/bases.md`` gives the definition in words. It does not use torch's generator, so that the numbers are the same for
every machine, thread count and version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

_WORDS_PER_CHUNK = 1 << 22  # bounds the scratch memory of a draw to about 100 MB


def words(key: int, counts: Iterator[int]) -> Iterator[np.ndarray]:
    """Yield arrays of 24-bit integers (uint32), the low bits of successive MT19937 words."""
    generator = np.random.RandomState(key % 2**32)
    for count in counts:
        yield generator.randint(0, 2**32, size=count, dtype=np.uint32) & np.uint32(0xFFFFFF)


def chunks(total: int) -> Iterator[int]:
    """Yield the sizes of the pieces in which so many words are drawn."""
    for start in range(0, total, _WORDS_PER_CHUNK):
        yield min(_WORDS_PER_CHUNK, total - start)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return bit patterns (uint16) of float32 values rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def std(values: list[float], counts: list[int]) -> float:
    """Return the sample standard deviation of ``values`` that occur ``counts`` times; 1 if it is 0 or undefined."""
    total = sum(counts)
    if total < 2:
        return 1.0
    mean = math.fsum(v * c for v, c in zip(values, counts, strict=True)) / total
    variance = math.fsum(c * (v - mean) ** 2 for v, c in zip(values, counts, strict=True)) / (total - 1)
    return math.sqrt(variance) or 1.0
