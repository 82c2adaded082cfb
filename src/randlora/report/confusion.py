"""Counts of right and wrong labels, from the predictions of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from randlora.report.runs import Entry

MOST_LABELS = 20  # beyond, the matrix is too wide for a page


@dataclass(frozen=True)
class Confusion:
    """Counts of labels against predicted labels.

    Attributes:
        labels: all labels that occur, sorted.
        counts: ``counts[i][j]`` examples have label i and were given label j.
    """

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def remark(self) -> str:
        """A remark if always giving the most frequent label would be as accurate; empty otherwise."""
        sizes = [sum(row) for row in self.counts]
        total, largest = sum(sizes), max(sizes)
        hits = sum(row[number] for number, row in enumerate(self.counts))
        if largest == total or hits > largest:
            return ""
        label = self.labels[sizes.index(largest)]
        return f"accuracy {hits / total:.1%} is no better than always saying {label!r}: {largest / total:.1%}"


def confusion(examples: Sequence[Entry]) -> Confusion | None:
    """Return the counts over all examples; ``None`` with fewer than two labels or more than ``MOST_LABELS``."""
    found = [(one.get("label"), one.get("predicted")) for one in examples]
    pairs = Counter((one, other) for one, other in found if isinstance(one, str) and isinstance(other, str))
    labels = tuple(sorted({label for pair in pairs for label in pair}))
    if not 1 < len(labels) <= MOST_LABELS:
        return None
    return Confusion(labels, tuple(tuple(pairs[row, column] for column in labels) for row in labels))


@dataclass(frozen=True)
class Share:
    """The counts for one label, where an example may have any number of labels.

    Attributes:
        label: name of the label.
        there: number of examples that have the label.
        given: number of examples that were given the label.
        right: number of examples that have the label and were given it.
    """

    label: str
    there: int
    given: int
    right: int

    @property
    def f1(self) -> float:
        """The F1 score: 2·right / (there + given)."""
        return 2 * self.right / (self.there + self.given)


def shares(examples: Sequence[Entry]) -> list[Share]:
    """Return the counts for each label, most frequent first; empty unless examples have lists of labels."""
    there, given, right = Counter[str](), Counter[str](), Counter[str]()
    for one in examples:
        wanted, guessed = one.get("label"), one.get("predicted")
        if isinstance(wanted, list) and isinstance(guessed, list):
            names = set(map(str, wanted)), set(map(str, guessed))
            there.update(names[0])
            given.update(names[1])
            right.update(names[0] & names[1])
    labels = sorted({*there, *given}, key=lambda name: (-there[name], name))
    return [Share(name, there[name], given[name], right[name]) for name in labels]
