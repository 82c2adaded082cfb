"""Files that appear whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from randlora.errors import ConfigError, RandLoraError


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    """Call ``write`` with a temporary name beside ``path``, then move the result there in one step.

    A reader, or a crash at any moment, finds the old file or the new one. An error in ``write`` leaves the old file
    and no temporary one.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        with disk_errors(target):
            write(temporary)
        os.chmod(temporary, target.stat().st_mode if target.exists() else 0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


@contextmanager
def folder_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a new folder to fill with files. It gets its name ``path`` when the context ends without an error.

    Raises:
        ConfigError: if there is something at ``path`` already, other than an empty folder.
    """
    target = Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"there is something in {path} already: name a folder that does not exist")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with disk_errors(target):
            yield temporary
        for one in (temporary, *temporary.rglob("*")):
            os.chmod(one, (0o777 if one.is_dir() else 0o666) & ~_umask())
            (_sync_folder if one.is_dir() else _sync)(one)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(target.parent)


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
_LESS_THAN_ANY_FILE = 2**16  # bytes


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise errors of libraries for a disk that is full or read-only as the ``OSError`` that caused them."""
    try:
        yield
    except RandLoraError:
        raise
    except OSError as error:
        if error.filename is not None or error.errno not in _DISK:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
    except Exception as error:  # safetensors, tokenizers and torch each have their own
        number = _number_of(str(error), Path(path))
        if number is None:
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _number_of(text: str, path: Path) -> int | None:
    """Return the system's number of an error; torch writes none, so that only a full disk is known, by its space."""
    found = re.search(r"\(os error (\d+)\)", text)
    if found is not None:
        return int(found[1])
    there = path if path.is_dir() else path.parent
    torchs = "PytorchStreamWriter" in text or "iostream" in text
    return errno.ENOSPC if torchs and shutil.disk_usage(there).free < _LESS_THAN_ANY_FILE else None


def write_json(content: dict[str, Any], folder: str | os.PathLike[str], name: str) -> None:
    """Write ``content`` as sorted, indented JSON to ``folder/name``; make the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(Path(folder) / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``."""

    def write(temporary: str) -> None:
        Path(temporary).write_text(text, encoding="utf-8")

    write_atomically(path, write)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
