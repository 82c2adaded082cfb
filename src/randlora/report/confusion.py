"""What a classifier took for what, from the predictions that a run left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from randlora.report.runs import Entry

MOST_LABELS = 20  # of a matrix that is shown


@dataclass(frozen=True)
class Confusion:
    """Counts of labels against predicted labels.

    Attributes:
        labels: all that occur, in their order.
        counts: for each label how many of its examples were given which.
    """

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def remark(self) -> str:
        """What there is to say where nothing was won over always giving the most frequent label; else empty."""
        sizes = [sum(row) for row in self.counts]
        total, largest = sum(sizes), max(sizes)
        hits = sum(row[number] for number, row in enumerate(self.counts))
        if largest == total or hits > largest:
            return ""
        label = self.labels[sizes.index(largest)]
        return f"accuracy {hits / total:.1%} is no better than always saying {label!r}: {largest / total:.1%}"


def confusion(examples: Sequence[Entry]) -> Confusion | None:
    """Of all examples; ``None`` where they have no labels, or more than ``MOST_LABELS``."""
    pairs = Counter(
        (str(one["label"]), str(one["predicted"])) for one in examples if {"label", "predicted"} <= one.keys()
    )
    labels = tuple(sorted({label for pair in pairs for label in pair}))
    if not 1 < len(labels) <= MOST_LABELS:
        return None
    return Confusion(labels, tuple(tuple(pairs[row, column] for column in labels) for row in labels))
