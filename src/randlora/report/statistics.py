"""How sure a measured accuracy is."""

from __future__ import annotations

import math


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927), 95% by default.

    Args:
        successes: number of successes, 0 to ``trials``.
        trials: number of trials, at least 1.
        z: quantile of the normal distribution for the wanted confidence.

    Raises:
        ValueError: if the numbers are no count of successes among trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes in {trials} trials is no proportion")
    share = successes / trials
    spread = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    middle = share + z**2 / (2 * trials)
    scale = 1 + z**2 / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
