"""Readers of tables in files, by the kind of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
from datasets import Dataset, IterableDataset, load_dataset

from randlora.errors import ConfigError

_READERS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    # reader of a whole file; name of the `datasets` builder that streams a file; arguments of both
    ".csv": (Dataset.from_csv, "csv", {}),
    ".tsv": (Dataset.from_csv, "csv", {"sep": "\t"}),
    ".jsonl": (Dataset.from_json, "json", {}),
    ".json": (Dataset.from_json, "json", {}),
    ".parquet": (Dataset.from_parquet, "parquet", {}),
    ".txt": (Dataset.from_text, "text", {}),  # a text in each line; the column is `text`
}
CELLS = (".csv", ".tsv")
"""Kinds of file whose cells are text: those that :func:`cells_of` reads."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def kind_of(path: Path) -> str | None:
    """Return the ending of a file that decides its reader, without a compression's ending; ``None`` for other files."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return name.suffix.lower() if name.suffix.lower() in _READERS else None


def read_file(source: str, encoding: str | None, streaming: bool = False) -> Dataset | IterableDataset:
    """Return the rows of a file.

    Args:
        source: path of the file.
        encoding: encoding of the text; UTF-8 if ``None``.
        streaming: whether to read rows on demand, and to keep none.

    Raises:
        ConfigError: if the file does not exist, is of an unknown kind, or cannot be read.
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
    except Exception as error:  # readers raise any error of their parsers
        raise ConfigError(f"cannot read the data file {source!r}: {_reason(error, encoding)}") from error


def cells_of(source: str, encoding: str | None) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the headings of a CSV or TSV file by the columns' names in :func:`read_file`, and its rows, as written.

    A name differs from its heading where that is empty or repeats another. Cells keep their text, such as 007 or NA.
    """
    _, _, arguments = _READERS[kind_of(Path(source)) or ""]
    arguments = {**arguments, "dtype": str, "keep_default_na": False, "encoding": encoding}
    rows = pandas.read_csv(source, **arguments)
    first = pandas.read_csv(source, header=None, nrows=1, **arguments)
    return dict(zip(rows.columns, first.iloc[0], strict=True)), rows.to_dict("records")


def _reason(error: Exception, encoding: str | None) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError | LookupError):
        return f"it is not in {encoding or 'UTF-8'} ({cause}); name another by encoding, such as cp1252 or utf-16"
    return "it holds no rows" if "corresponds to no data" in str(cause) else str(cause)
