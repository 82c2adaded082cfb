"""Training and evaluation data from files, folders and the hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings

_EVALUATION_SPLITS = ("validation", "test")
_TEXT_TYPES = ("string", "large_string")


class Data(NamedTuple):
    """What a run trains and evaluates on.

    Attributes:
        train: column ``text`` and, for classification, ``label`` (int).
        evaluation: the same columns, none of its rows trained on.
        labels: names of the labels in the order of their numbers; empty for causal language modelling.
    """

    train: Dataset
    evaluation: Dataset
    labels: list[str]


def load_data(settings: TrainSettings) -> Data:
    """Reads, checks and splits the data that ``settings`` name.

    Raises:
        ConfigError: if data, a split or a column is missing, empty or malformed.
    """
    train, evaluation = _read(settings.data, settings), None
    if isinstance(train, DatasetDict):
        if "train" not in train:
            raise ConfigError(f"data={settings.data!r} has no split 'train', only {sorted(train)}")
        evaluation = next((train[name] for name in _EVALUATION_SPLITS if name in train), None)
        train = train["train"]
    if settings.eval_data is not None:
        evaluation = _one_split(_read(settings.eval_data, settings), settings.eval_data)

    classify = settings.task == "sequence-classification"
    train = _columns(train, settings, settings.data)
    labels = _label_names(train) if classify else []
    if evaluation is None:
        train, evaluation = _split(train, settings)
    else:
        evaluation = _columns(evaluation, settings, settings.eval_data or settings.data)
    if classify:
        train, evaluation = (_encode(part, labels) for part in (train, evaluation))
    return Data(train, evaluation, labels)


def load_rows(source: str, settings: TrainSettings) -> Dataset:
    """All rows of ``source``, or of its validation or test split, under the names ``text`` and ``label``.

    Labels are as the data has them.

    Raises:
        ConfigError: if data, a split or a column is missing, empty or malformed.
    """
    return _columns(_one_split(_read(source, settings), source), settings, source)


def _read(source: str, settings: TrainSettings) -> Dataset | DatasetDict:
    path = Path(source)
    readers = {
        ".csv": Dataset.from_csv,
        ".jsonl": Dataset.from_json,
        ".json": Dataset.from_json,
        ".parquet": Dataset.from_parquet,
    }
    if path.is_dir():
        try:
            return load_from_disk(source)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{source!r} is a folder, but not one that datasets' save_to_disk wrote: {error}"
            ) from None
    if path.suffix.lower() in readers:
        if not path.is_file():
            raise ConfigError(f"there is no data file {source!r}")
        try:
            return readers[path.suffix.lower()](source)
        except Exception as error:  # the readers raise whatever their parsers raise
            raise ConfigError(f"cannot read the data file {source!r}: {error.__cause__ or error}") from error
    if path.exists():
        raise ConfigError(f"data file {source!r} must end in one of {', '.join(readers)}")
    try:
        return load_dataset(source, trust_remote_code=settings.trust_remote_code or None)
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"{source!r} is no local file or folder, and no dataset of the hub that can be loaded: {error}"
        ) from error


def _one_split(data: Dataset | DatasetDict, source: str) -> Dataset:
    if isinstance(data, Dataset):
        return data
    for name in (*_EVALUATION_SPLITS, "train"):
        if name in data:
            return data[name]
    raise ConfigError(f"{source!r} has none of the splits {_EVALUATION_SPLITS}, only {sorted(data)}")


def _columns(data: Dataset, settings: TrainSettings, source: str) -> Dataset:
    """The needed columns under fixed names, without rows that lack a value being passed over in silence."""
    wanted = {"text": settings.text_column}
    if settings.task == "sequence-classification":
        wanted["label"] = settings.label_column
    for setting, column in wanted.items():
        if column not in data.column_names:
            raise ConfigError(
                f"{source!r} has no column {column!r}; it has {data.column_names}. Name the right one by "
                f"{setting}_column."
            )
        feature = data.features[column]
        fits = isinstance(feature, Value | ClassLabel) and (setting == "label" or feature.dtype in _TEXT_TYPES)
        if not fits:
            raise ConfigError(
                f"column {column!r} of {source!r} holds no {setting}s but {feature}; name another by {setting}_column"
            )
        empty = [row for row, value in enumerate(data[column]) if value is None]
        if empty:
            raise ConfigError(f"{source!r} has no {column!r} in {len(empty)} of its rows, first in row {empty[0]}")
    if len(data) == 0:
        raise ConfigError(f"{source!r} holds no rows")
    data = data.select_columns(list(wanted.values()))
    return data.rename_columns({column: name for name, column in wanted.items() if column != name})


def _label_names(data: Dataset) -> list[str]:
    feature = data.features["label"]
    if hasattr(feature, "names"):
        return list(feature.names)
    found = sorted(set(data["label"]))
    if len(found) < 2:
        raise ConfigError(f"the training data has the single label {found[0]!r}; a classifier needs two or more")
    return [str(label) for label in found]


def _encode(data: Dataset, labels: list[str]) -> Dataset:
    """Labels as numbers."""
    if hasattr(data.features["label"], "names"):
        return data
    numbers = {label: number for number, label in enumerate(labels)}
    unknown = sorted({str(label) for label in data["label"]} - set(numbers))
    if unknown:
        raise ConfigError(f"the evaluation data has labels that the training data has not: {unknown}")
    encoded = [numbers[str(label)] for label in data["label"]]
    return data.remove_columns("label").add_column("label", encoded)


def _split(data: Dataset, settings: TrainSettings) -> tuple[Dataset, Dataset]:
    """A seeded split that keeps all copies of a text on one side."""
    texts = sorted(set(data["text"]))
    held_out = round(len(texts) * settings.eval_fraction)
    if not 0 < held_out < len(texts):
        raise ConfigError(
            f"eval_fraction={settings.eval_fraction} of {len(texts)} different texts leaves nothing on one side; give "
            "eval_data, or more data"
        )
    shuffled = Dataset.from_dict({"text": texts}).shuffle(seed=settings.seed)["text"]
    evaluation = set(shuffled[:held_out])
    rows: tuple[list[int], list[int]] = ([], [])
    for row, text in enumerate(data["text"]):
        rows[text in evaluation].append(row)
    return data.select(rows[0]), data.select(rows[1])
