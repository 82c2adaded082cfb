"""Training and evaluation data from files, folders and the hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings
from randlora.train.tasks import TASKS

_EVALUATION_SPLITS = ("validation", "test")


class Data(NamedTuple):
    """What a run trains and evaluates on.

    Attributes:
        train: the columns of the task, labels as numbers.
        evaluation: the same columns, none of its rows trained on.
        labels: names of the labels in the order of their numbers; empty for language.
    """

    train: Dataset
    evaluation: Dataset
    labels: list[str]


def load_data(settings: TrainSettings) -> Data:
    """Reads, checks and splits the data that ``settings`` name.

    Raises:
        ConfigError: if data, a split or a column is missing, empty or malformed.
    """
    task = TASKS[settings.task]
    train, evaluation = _read(settings.data, settings), None
    if isinstance(train, DatasetDict):
        if "train" not in train:
            raise ConfigError(f"data={settings.data!r} has no split 'train', only {sorted(train)}")
        evaluation = next((train[name] for name in _EVALUATION_SPLITS if name in train), None)
        train = train["train"]
    if settings.eval_data is not None:
        evaluation = _one_split(_read(settings.eval_data, settings), settings.eval_data)

    train = _checked(train, settings, settings.data)
    labels = task.labels(train)
    if evaluation is None:
        train, evaluation = _split(train, settings)
    else:
        evaluation = _checked(evaluation, settings, settings.eval_data or settings.data)
    return Data(task.encode(train, labels), task.encode(evaluation, labels), labels)


def load_rows(source: str, settings: TrainSettings) -> Dataset:
    """All rows of ``source``, or of its validation or test split, in the columns of the task.

    Labels are as the data has them.

    Raises:
        ConfigError: if data, a split or a column is missing, empty or malformed.
    """
    return _checked(_one_split(_read(source, settings), source), settings, source)


def _read(source: str, settings: TrainSettings) -> Dataset | DatasetDict:
    path = Path(source)
    readers = {
        ".csv": Dataset.from_csv,
        ".jsonl": Dataset.from_json,
        ".json": Dataset.from_json,
        ".parquet": Dataset.from_parquet,
    }
    if path.is_dir():
        return _read_folder(source, settings)
    if path.suffix.lower() in readers:
        if not path.is_file():
            raise ConfigError(f"there is no data file {source!r}")
        try:
            return readers[path.suffix.lower()](source)
        except Exception as error:  # the readers raise whatever their parsers raise
            raise ConfigError(f"cannot read the data file {source!r}: {_reason(error)}") from error
    if path.exists():
        raise ConfigError(f"data file {source!r} must end in one of {', '.join(readers)}")
    try:
        return load_dataset(source, trust_remote_code=settings.trust_remote_code or None)
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"{source!r} is no local file or folder, and no dataset of the hub that can be loaded: {error}"
        ) from error


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not in UTF-8 ({cause})"
    return "it holds no rows" if "corresponds to no data" in str(cause) else str(cause)


def _one_split(data: Dataset | DatasetDict, source: str) -> Dataset:
    if isinstance(data, Dataset):
        return data
    for name in (*_EVALUATION_SPLITS, "train"):
        if name in data:
            return data[name]
    raise ConfigError(f"{source!r} has none of the splits {_EVALUATION_SPLITS}, only {sorted(data)}")


def _read_folder(source: str, settings: TrainSettings) -> Dataset | DatasetDict:
    """What `datasets` saved; or images, whose folders are their labels."""
    saved = any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if settings.task == "image-classification" and not saved:
            return load_dataset("imagefolder", data_dir=source)
        return load_from_disk(source)
    except Exception as error:  # the readers raise whatever their parsers raise
        saved_by = "not one that datasets' save_to_disk wrote"
        reason = (
            f"holds no images in folders named by their labels, and is {saved_by}: {error}"
            if settings.task == "image-classification"
            else f"{saved_by}; a folder of images needs task='image-classification'"
        )
        raise ConfigError(f"{source!r} is a folder, but {reason}") from None


def _checked(rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
    if len(rows) == 0:
        raise ConfigError(f"{source!r} holds no rows")
    return TASKS[settings.task].read(rows, settings, source)


def _split(data: Dataset, settings: TrainSettings) -> tuple[Dataset, Dataset]:
    """A seeded split that keeps all copies of an example on one side."""
    given = TASKS[settings.task].identities(data)
    different = sorted(set(given))
    held_out = round(len(different) * settings.eval_fraction)
    if not 0 < held_out < len(different):
        raise ConfigError(
            f"eval_fraction={settings.eval_fraction} of {len(different)} different examples leaves nothing on one "
            "side; give eval_data, or more data"
        )
    shuffled = Dataset.from_dict({"identity": different}).shuffle(seed=settings.seed)["identity"]
    evaluation = set(shuffled[:held_out])
    rows: tuple[list[int], list[int]] = ([], [])
    for row, identity in enumerate(given):
        rows[identity in evaluation].append(row)
    return data.select(rows[0]), data.select(rows[1])
