"""Tables from files: of what kind a file is, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from randlora.errors import ConfigError

_READERS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    # how all of it is read, and by which of datasets' readers a part
    ".csv": (Dataset.from_csv, "csv", {}),
    ".tsv": (Dataset.from_csv, "csv", {"sep": "\t"}),
    ".jsonl": (Dataset.from_json, "json", {}),
    ".json": (Dataset.from_json, "json", {}),
    ".parquet": (Dataset.from_parquet, "parquet", {}),
    ".txt": (Dataset.from_text, "text", {}),  # a text each line, in the column `text`
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def kind_of(path: Path) -> str | None:
    """The ending that says how a file is read, without that of a compression; ``None`` for others."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return name.suffix.lower() if name.suffix.lower() in _READERS else None


def read_file(source: str, encoding: str | None, streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of a file.

    Args:
        source: its path.
        encoding: of its text; UTF-8 if ``None``.
        streaming: whether to read them as they are asked for, and to keep none.

    Raises:
        ConfigError: if it is not there, of an unknown kind, or cannot be read.
    """
    path = Path(source)
    kind = kind_of(path)
    if kind is None:
        raise ConfigError(
            f"data file {source!r} must end in one of {', '.join(_READERS)}, or in one of these and "
            f"{', '.join(_COMPRESSED)}"
        )
    if not path.is_file():
        raise ConfigError(f"there is no data file {source!r}")
    read, reader, arguments = _READERS[kind]
    if encoding is not None and kind != ".parquet":
        arguments = {**arguments, "encoding": encoding}
    try:
        if streaming:
            return load_dataset(reader, data_files=source, split="train", streaming=True, **arguments)
        return read(source, **arguments)
    except Exception as error:  # the readers raise whatever their parsers raise
        raise ConfigError(f"cannot read the data file {source!r}: {_reason(error, encoding)}") from error


def _reason(error: Exception, encoding: str | None) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError | LookupError):
        return f"it is not in {encoding or 'UTF-8'} ({cause}); name another by encoding, such as cp1252 or utf-16"
    return "it holds no rows" if "corresponds to no data" in str(cause) else str(cause)
