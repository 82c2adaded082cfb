"""Training data that is read during training; each row is drawn from a window of rows in memory."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from torch.utils.data import IterableDataset

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings
from randlora.train.tasks import TASKS

MOST_EVALUATED = 1000  # examples of a stream, by default
_WINDOW = 10_000  # rows in the window
_IMAGES = 1000  # images in the window: these are larger
_BLOCK = 1000  # rows that are read, checked and prepared together

Row = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """A stream of rows, in the columns of the data and unchecked.

    Attributes:
        rows: all rows.
        features: features of the columns.
        source: file, folder or name of the rows.
        settings: settings of the run.
        held_out: numbers of the rows that are not trained on.
        labels: names of the labels.
    """

    rows: datasets.IterableDataset
    features: Features
    source: str
    settings: TrainSettings
    held_out: frozenset[int] = frozenset()
    labels: tuple[str, ...] = ()

    def first(self, count: int) -> Dataset:
        """Return the first rows in the columns of the task.

        Raises:
            ConfigError: if there are no rows, or a row is malformed.
        """
        return self.checked(list(islice(_read(self.rows, self.source), count)))

    def unchecked(self) -> Dataset:
        """Return the first rows in the columns of the data."""
        return self._table(list(islice(_read(self.rows, self.source), _BLOCK)))

    def without_evaluation(self, count: int) -> tuple[Stream, Dataset]:
        """Return the stream without ``count`` rows of its first window, drawn by the seed, and these rows."""
        window = list(islice(_read(self.rows, self.source), self._window))
        drawn = np.random.default_rng(self.settings.seed).permutation(len(window))[:count].tolist()
        return replace(self, held_out=frozenset(drawn)), self.checked([window[number] for number in sorted(drawn)])

    def named(self, local: bool) -> Stream:
        """Return the stream with its labels: the names in the data, or the labels that a pass finds.

        Args:
            local: whether the data is on this machine.

        Raises:
            ConfigError: if a pass would be needed, and would download everything.
        """
        task = TASKS[self.settings.task]
        known = self.first(_BLOCK)
        if task.classifies and task.name != "regression" and not _names_labels(known, task.label_column):
            if not local:
                raise ConfigError(
                    f"{self.source!r} does not name its labels, and to find them everything would have to be read: "
                    "leave streaming out, or download the data and name its files"
                )
            known = self._telling(task.label_column)
        return replace(self, labels=tuple(task.labels(known)))

    def examples(self, processor: Any, epoch: int) -> Iterator[Row]:
        """Yield the prepared examples of one pass; each pass has an order of its own."""
        kept = (row for number, row in enumerate(_read(self.rows, self.source)) if number not in self.held_out)
        drawn = _drawn(islice(kept, self.settings.max_samples), self._window, f"{self.settings.seed} {epoch}")
        task = TASKS[self.settings.task]
        for block in _blocks(drawn):
            with _no_bars():
                rows = task.encode(self.checked(block), list(self.labels))
                prepared = task.prepare(rows, processor, self.settings)
            yield from prepared

    def checked(self, block: list[Row]) -> Dataset:
        """Return a block of rows in the columns of the task.

        Raises:
            ConfigError: if there are no rows, or a row is malformed.
        """
        rows = self._table(block)
        with _no_bars():
            return TASKS[self.settings.task].read(rows, self.settings, self.source)

    @property
    def _window(self) -> int:
        return _WINDOW if TASKS[self.settings.task].counts_tokens else _IMAGES

    def _table(self, block: list[Row]) -> Dataset:
        if not block:
            raise ConfigError(f"{self.source!r} holds no rows")
        known = Features({name: kind for name, kind in self.features.items() if kind != Value("null")})
        try:
            return Dataset.from_list([{name: row.get(name) for name in known} for row in block], features=known)
        except Exception as error:  # pyarrow raises many kinds
            raise ConfigError(f"{self.source!r} has rows of another kind than its first ones: {error}") from None

    def _telling(self, column: str) -> Dataset:
        """Return rows that together have all labels, from a pass over the stream."""
        seen: set[Any] = set()
        kept: list[Dataset] = []
        for block in _blocks(_read(self.rows, self.source)):
            rows = self.checked(block)
            new = []
            for number, value in enumerate(rows[column]):
                values = value if isinstance(value, list) else [value]
                told = {*values, len(values) > 1}  # keeps a row with several labels, too
                if not seen.issuperset(told):
                    seen |= told
                    new.append(number)
            if new:
                kept.append(rows.select(new))
        return datasets.concatenate_datasets(kept)


class Prepared(IterableDataset[Row]):
    """The examples of a stream, for the Trainer: pass after pass without an end.

    The Trainer counts all steps on a stream as one epoch. When a run goes on, the Trainer skips examples from the
    beginning.
    """

    def __init__(self, stream: Stream, processor: Any) -> None:
        self._stream, self._processor = stream, processor

    def __iter__(self) -> Iterator[Row]:
        for epoch in count():
            empty = True
            for example in self._stream.examples(self._processor, epoch):
                empty = False
                yield example
            if empty:
                raise ConfigError(
                    f"nothing of {self._stream.source!r} is left to train on: lower max_eval_samples, or name eval_data"
                )


def as_stream(rows: datasets.IterableDataset, source: str, settings: TrainSettings) -> Stream:
    """Return a stream of rows with the columns that the rows declare, or those of the first rows.

    Raises:
        ConfigError: if there are no rows, or a row cannot be read.
    """
    features = rows.features
    if features is None:
        first = list(islice(_read(rows, source), _BLOCK))
        if not first:
            raise ConfigError(f"{source!r} holds no rows")
        features = Dataset.from_list(first).features
    return Stream(rows, features, source, settings)


def _read(rows: datasets.IterableDataset, source: str) -> Iterator[Row]:
    """Yield the rows; images as files, or as the bytes of files."""
    try:
        yield from rows.decode(False) if rows.features else rows
    except Exception as error:  # readers raise any error of their parsers
        raise ConfigError(f"cannot read {source!r}: {error.__cause__ or error}") from error


def _drawn(rows: Iterable[Row], window: int, seed: str) -> Iterator[Row]:
    """Yield rows at random from a window of rows; the next row takes the place of the yielded one."""
    draw = random.Random(seed)
    held: list[Row] = []
    for row in rows:
        if len(held) < window:
            held.append(row)
            continue
        place = draw.randrange(window)
        yield held[place]
        held[place] = row
    draw.shuffle(held)
    yield from held


def _blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    source = iter(rows)
    while block := list(islice(source, _BLOCK)):
        yield block


def _names_labels(rows: Dataset, column: str) -> bool:
    feature = rows.features[column]
    return hasattr(getattr(feature, "feature", feature), "names")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Disable the bars of ``datasets`` within the context: each block of rows would have one."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
