"""Bootstrap intervals of metrics that are not means over examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_DRAWS = 2000
_AT_ONCE = 4_000_000  # counts in memory


def bootstrap_intervals(
    metrics: Callable[[np.ndarray], dict[str, np.ndarray]], examples: int
) -> dict[str, tuple[float, float]]:
    """Return 95% percentile intervals (Efron 1979) by metric; the draws are the same in each call.

    Args:
        metrics: takes how often each example was drawn, (draws, examples), and returns each metric for each draw.
        examples: number of examples; with less than two, there are no intervals.
    """
    if examples < 2:
        return {}
    generator = np.random.default_rng(0)
    width = max(1, _AT_ONCE // examples)
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, _DRAWS, width):
        draws = min(width, _DRAWS - start)
        counts = generator.multinomial(examples, np.full(examples, 1 / examples), size=draws)
        for name, values in metrics(counts).items():
            found.setdefault(name, []).append(values)
    return {name: _middle(np.concatenate(values)) for name, values in found.items()}


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
