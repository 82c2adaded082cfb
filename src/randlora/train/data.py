"""Training and evaluation data from files, folders and the hub."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from randlora.errors import ConfigError
from randlora.train.files import kind_of, read_file
from randlora.train.settings import TaskName, TrainSettings, read_settings
from randlora.train.stream import MOST_EVALUATED, Stream, as_stream
from randlora.train.tasks import TASKS

_EVALUATION_SPLITS = ("validation", "test")
Source: TypeAlias = str | Sequence[str]
"""A file, a folder or a name on the hub; or several."""
_Rows: TypeAlias = Dataset | IterableDataset
_Read: TypeAlias = _Rows | DatasetDict | IterableDatasetDict


class Data(NamedTuple):
    """The data of a run.

    Attributes:
        train: rows in the columns of the task, labels as numbers; or an unread stream of rows.
        evaluation: rows in the same columns, which are not trained on.
        labels: names of the labels in the order of their numbers; empty for language.
    """

    train: Dataset | Stream
    evaluation: Dataset
    labels: list[str]


def load_data(settings: TrainSettings) -> Data:
    """Return the data of ``settings``, checked and split.

    Raises:
        ConfigError: if data, a split or a column is missing, empty or malformed.
    """
    if settings.streaming:
        return _load_stream(settings)
    task = TASKS[settings.task]
    parts, part = _training(settings)
    train = _joined([_checked(rows, settings, source) for rows, source in parts], settings.data)
    evaluation = None if part is None else _checked(part, settings, str(settings.data))
    if settings.eval_data is not None:
        evaluation = load_rows(settings.eval_data, settings)
    labels = task.labels(train)
    if evaluation is None:
        train, evaluation = _split(train, settings)
    train = _limited(train, settings.max_samples, settings)
    evaluation = _limited(evaluation, settings.max_eval_samples, settings)
    return Data(task.encode(train, labels), task.encode(evaluation, labels), labels)


def load_inputs(source: Source, settings: TrainSettings) -> tuple[Dataset, list[Any]]:
    """Return all rows of ``source``, or of its validation or test split, unchanged, and the inputs in them.

    Raises:
        ConfigError: as :func:`load_rows`, but labels may be missing.
    """
    tables, inputs = [], []
    for one in _sources(source):
        rows = _one_split(_read(one, settings), one, settings)
        _require_rows(rows, one)
        tables.append(rows)
        inputs += TASKS[settings.task].inputs(rows, settings, one)
    return _joined(tables, source), inputs


def load_rows(source: Source, settings: TrainSettings) -> Dataset:
    """Return all rows of ``source``, or of its validation or test split, in the columns of the task.

    Labels keep the values of the data.

    Raises:
        ConfigError: if data, a split or a column is missing, empty or malformed.
    """
    tables = [_checked(_one_split(_read(one, settings), one, settings), settings, one) for one in _sources(source)]
    return _joined(tables, source)


def with_task_of_labels(settings: TrainSettings) -> TrainSettings:
    """Return ``settings`` with the task that fits the labels, where they name classification of texts.

    Numbers with a fraction make the task a regression; lists, or several columns, make it multi-label classification. A
    warning names the new task.

    Raises:
        ConfigError: if the data cannot be read, or a setting is not allowed for the new task.
    """
    if settings.task != "sequence-classification":
        return settings
    column = settings.label_column or "label"
    found = _task_of_labels(column, settings)
    if found is None:
        return settings
    warnings.warn(f"the labels in {column!r} make this a task={found!r}", stacklevel=2)
    return read_settings(TrainSettings, None, settings.model_dump() | {"task": found})


def _task_of_labels(column: str | list[str], settings: TrainSettings) -> TaskName | None:
    if isinstance(column, list):
        return "multi-label-classification"
    rows, source = _training(settings)[0][0]
    if isinstance(rows, IterableDataset):
        rows = as_stream(rows, source, settings).unchecked()
    feature = rows.features.get(column)
    if isinstance(feature, List):
        return "multi-label-classification"
    is_float = isinstance(feature, Value) and feature.dtype.startswith(("float", "double", "decimal"))
    if is_float and any(value is not None and math.isfinite(value) and value % 1 for value in rows[column]):
        return "regression"
    return None


def _load_stream(settings: TrainSettings) -> Data:
    """Return the training data as an unread stream, and a limited number of rows for evaluation."""
    task = TASKS[settings.task]
    parts, part = _training(settings)
    if len(parts) > 1 and not task.counts_tokens:
        raise ConfigError(f"data={settings.data}: streaming reads images from one source")
    try:
        rows = parts[0][0] if len(parts) == 1 else concatenate_datasets([rows for rows, _ in parts])
    except ValueError as error:
        raise ConfigError(f"{settings.data} do not fit together: {error}") from None
    local = all(Path(source).exists() for _, source in parts)
    train = as_stream(rows, parts[0][1], settings).named(local)
    most = settings.max_eval_samples or MOST_EVALUATED
    if settings.eval_data is not None:
        sources = [(_one_split(_read(one, settings), one, settings), one) for one in _sources(settings.eval_data)]
        evaluation = _joined([as_stream(*one, settings).first(most) for one in sources], settings.eval_data)
        evaluation = evaluation.select(range(min(most, len(evaluation))))
    elif part is not None:
        evaluation = as_stream(part, parts[0][1], settings).first(most)
    else:
        train, evaluation = train.without_evaluation(most)
    labels = list(train.labels)
    return Data(train, task.encode(evaluation, labels), labels)


def _training(settings: TrainSettings) -> tuple[list[tuple[_Rows, str]], _Rows | None]:
    """Return the training data, each part with its source; and the evaluation split of a single source, if any."""
    parts, evaluation = [], None
    sources = _sources(settings.data)
    for source in sources:
        rows = _read(source, settings)
        if isinstance(rows, dict):
            wanted = settings.split or "train"
            if wanted not in rows:
                raise ConfigError(f"data={source!r} has no split {wanted!r}, only {sorted(rows)}: name one by split")
            if len(sources) == 1 and settings.eval_data is None:
                evaluation = _evaluation_split(rows, source, settings)
            rows = rows[wanted]
        parts.append((rows, source))
    return parts, evaluation


def _evaluation_split(data: dict[str, _Rows], source: str, settings: TrainSettings) -> _Rows | None:
    wanted = [name for name in _evaluation_names(settings) if name in data and name != (settings.split or "train")]
    if settings.eval_split is not None and not wanted:
        raise ConfigError(f"data={source!r} has no split {settings.eval_split!r} to evaluate on, only {sorted(data)}")
    return data[wanted[0]] if wanted else None


def _evaluation_names(settings: TrainSettings) -> tuple[str, ...]:
    return _EVALUATION_SPLITS if settings.eval_split is None else (settings.eval_split,)


def _sources(source: Source) -> list[str]:
    return [source] if isinstance(source, str) else list(source)


def _joined(tables: list[Dataset], source: Source) -> Dataset:
    if len(tables) == 1:
        return tables[0]
    try:
        return concatenate_datasets([_with_plain_texts(one) for one in tables])
    except ValueError as error:
        raise ConfigError(f"{source} do not fit together: {error}") from None


def _with_plain_texts(rows: Dataset) -> Dataset:
    """Return rows with one type of text; readers give two, which cannot be joined."""
    large = [name for name, feature in rows.features.items() if feature == Value("large_string")]
    return rows.cast(Features({**rows.features, **dict.fromkeys(large, Value("string"))})) if large else rows


def _limited(rows: Dataset, most: int | None, settings: TrainSettings) -> Dataset:
    """Return at most ``most`` rows, drawn by the seed, in their order."""
    if most is None or most >= len(rows):
        return rows
    kept = np.random.default_rng(settings.seed).choice(len(rows), most, replace=False)
    return rows.select(np.sort(kept))


def _read(source: str, settings: TrainSettings) -> _Read:
    path = Path(source)
    if path.is_dir():
        return _read_folder(source, settings)
    if path.exists() or kind_of(path) is not None:
        return read_file(source, settings.encoding, settings.streaming)
    try:
        return load_dataset(
            source,
            settings.data_config,
            streaming=settings.streaming,
            trust_remote_code=settings.trust_remote_code or None,
        )
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"{source!r} is no local file or folder, and no dataset of the hub that can be loaded: {error}"
        ) from error


def _one_split(data: _Read, source: str, settings: TrainSettings) -> Any:
    if not isinstance(data, dict):
        return data
    names = (*_evaluation_names(settings), *(() if settings.eval_split else ("train",)))
    for name in names:
        if name in data:
            return data[name]
    raise ConfigError(f"{source!r} has none of the splits {names}, only {sorted(data)}: name one by eval_split")


def _read_folder(source: str, settings: TrainSettings) -> _Read:
    """Return the rows that `datasets` saved in a folder; or images, whose folders are their labels."""
    saved = any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if settings.task == "image-classification" and not saved:
            return load_dataset("imagefolder", data_dir=source, streaming=settings.streaming)
        saved_rows = load_from_disk(source)
    except Exception as error:  # readers raise any error of their parsers
        saved_by = "not one that datasets' save_to_disk wrote"
        reason = (
            f"holds no images in folders named by their labels, and is {saved_by}: {error}"
            if settings.task == "image-classification"
            else f"{saved_by}; a folder of images needs task='image-classification'"
        )
        raise ConfigError(f"{source!r} is a folder, but {reason}") from None
    if not settings.streaming:
        return saved_rows
    if isinstance(saved_rows, Dataset):
        return saved_rows.to_iterable_dataset()
    return IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in saved_rows.items()})


def _require_rows(rows: Dataset, source: str) -> None:
    if len(rows) == 0:
        raise ConfigError(f"{source!r} holds no rows")


def _checked(rows: Any, settings: TrainSettings, source: str) -> Dataset:
    _require_rows(rows, source)
    return TASKS[settings.task].read(rows, settings, source)


def _split(data: Dataset, settings: TrainSettings) -> tuple[Dataset, Dataset]:
    """Return a seeded split with all copies of an example on one side, and the same share of each label on both."""
    task = TASKS[settings.task]
    given = task.identities(data)
    kinds = dict(zip(given, task.strata(data), strict=True))
    different = sorted(kinds)
    held_out = round(len(different) * settings.eval_fraction)
    if not 0 < held_out < len(different):
        raise ConfigError(
            f"eval_fraction={settings.eval_fraction} of {len(different)} different examples leaves nothing on one "
            "side; give eval_data, or more data"
        )
    shuffled = Dataset.from_dict({"identity": different}).shuffle(seed=settings.seed)["identity"]
    evaluation = _drawn(shuffled, kinds, held_out)
    rows: tuple[list[int], list[int]] = ([], [])
    for row, identity in enumerate(given):
        rows[identity in evaluation].append(row)
    return data.select(rows[0]), data.select(rows[1])


def _drawn(shuffled: Sequence[str], kinds: dict[str, Any], wanted: int) -> set[str]:
    """Return ``wanted`` of ``shuffled``, in the share of each kind; places left by rounding go to the largest rests."""
    counts = Counter(kinds.values())
    exact = {kind: count * wanted / len(shuffled) for kind, count in counts.items()}
    quota = {kind: int(share) for kind, share in exact.items()}
    for kind in sorted(exact, key=lambda kind: (quota[kind] - exact[kind], str(kind)))[: wanted - sum(quota.values())]:
        quota[kind] += 1
    drawn: set[str] = set()
    for identity in shuffled:
        if quota[kinds[identity]]:
            quota[kinds[identity]] -= 1
            drawn.add(identity)
    return drawn
