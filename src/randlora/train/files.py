"""Tables from files: of what kind a file is, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from randlora.errors import ConfigError

_READERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    ".csv": (Dataset.from_csv, {}),
    ".tsv": (Dataset.from_csv, {"sep": "\t"}),
    ".jsonl": (Dataset.from_json, {}),
    ".json": (Dataset.from_json, {}),
    ".parquet": (Dataset.from_parquet, {}),
    ".txt": (Dataset.from_text, {}),  # a text each line, in the column `text`
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def kind_of(path: Path) -> str | None:
    """The ending that says how a file is read, without that of a compression; ``None`` for others."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return name.suffix.lower() if name.suffix.lower() in _READERS else None


def read_file(source: str, encoding: str | None) -> Dataset:
    """The rows of a file.

    Args:
        source: its path.
        encoding: of its text; UTF-8 if ``None``.

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
    read, arguments = _READERS[kind]
    if encoding is not None and kind != ".parquet":
        arguments = {**arguments, "encoding": encoding}
    try:
        return read(source, **arguments)
    except Exception as error:  # the readers raise whatever their parsers raise
        raise ConfigError(f"cannot read the data file {source!r}: {_reason(error, encoding)}") from error


def _reason(error: Exception, encoding: str | None) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError | LookupError):
        return f"it is not in {encoding or 'UTF-8'} ({cause}); name another by encoding, such as cp1252 or utf-16"
    return "it holds no rows" if "corresponds to no data" in str(cause) else str(cause)
