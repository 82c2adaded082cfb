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
    found = [(one.get("label"), one.get("predicted")) for one in examples]
    pairs = Counter((one, other) for one, other in found if isinstance(one, str) and isinstance(other, str))
    labels = tuple(sorted({label for pair in pairs for label in pair}))
    if not 1 < len(labels) <= MOST_LABELS:
        return None
    return Confusion(labels, tuple(tuple(pairs[row, column] for column in labels) for row in labels))


@dataclass(frozen=True)
class Share:
    """One label of examples that have any number of labels.

    Attributes:
        label: its name.
        there: examples that have it.
        given: examples that were given it.
        right: examples of both kinds.
    """

    label: str
    there: int
    given: int
    right: int

    @property
    def f1(self) -> float:
        """Twice the right ones by those there and those given."""
        return 2 * self.right / (self.there + self.given)


def shares(examples: Sequence[Entry]) -> list[Share]:
    """Return what is known of each label, most frequent first; nothing where examples have no lists of labels."""
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
