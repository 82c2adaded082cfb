"""Numbers of values that train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from randlora.ops.bases import num_trainable


def count_trainable(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """Return the number of values of λ and γ of RandLoRA of that rank, n·(r + m) for each shape."""
    return sum(num_trainable(rank, min(shape)) for shape in shapes)


def count_lora(shapes: Iterable[tuple[int, int]], rank: int = 1) -> int:
    """Return the number of values of a LoRA of that rank, r·(in + out) for each shape."""
    return rank * sum(map(sum, shapes))


def lora_rank_of(shapes: Sequence[tuple[int, int]], trainable: int) -> int:
    """Return the rank, at least 1, of the LoRA on these layers whose number of values is nearest to ``trainable``."""
    return max(1, round(trainable / count_lora(shapes)))


def matched_lora_rank(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Return the rank of the LoRA whose number of values is nearest to RandLoRA's.

    Args:
        shapes: (in_features, out_features) of the adapted layers, or (out, in); one entry for each expert.
        rank: r of RandLoRA.
    """
    return lora_rank_of(shapes, count_trainable(shapes, rank))
