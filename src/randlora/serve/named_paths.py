"""The adapters on a command line: runs, adapters or folders of several, with or without names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from randlora.errors import ConfigError
from randlora.tuner.files.adapter_folder import CONFIG


class NamedPath(NamedTuple):
    """An adapter to serve.

    Attributes:
        name: name in requests.
        path: folder of the adapter or of its run.
        found: whether the adapter was found in a folder of several, rather than named on the command line.
    """

    name: str
    path: Path
    found: bool


def named_paths(words: Iterable[str]) -> list[NamedPath]:
    """Return the adapters named by words of the form ``PATH`` or ``NAME=PATH``, in the order of the words.

    A folder of several adapters and runs means all of them. Without a NAME, an adapter is called like its folder, and
    the adapter of a run like the run's folder.

    Raises:
        ConfigError: if two adapters have the same name.
    """
    found: dict[str, NamedPath] = {}
    for one in (one for word in words for one in _of_word(word)):
        if one.name in found:
            raise ConfigError(
                f"{str(found[one.name].path)!r} and {str(one.path)!r} would both be {one.name!r}: name one of them as "
                "NAME=PATH"
            )
        found[one.name] = one
    return list(found.values())


def _of_word(word: str) -> Iterator[NamedPath]:
    name, equals, rest = word.partition("=")
    if equals and not Path(word).exists():
        yield NamedPath(name, Path(rest), False)
        return
    path = Path(word)
    inside = [] if _is_one(path) or not path.is_dir() else sorted(one for one in path.iterdir() if _is_one(one))
    if inside:
        yield from (NamedPath(one.name, one, True) for one in inside)
    else:
        yield NamedPath(_name_of(path), path, False)


def _is_one(path: Path) -> bool:
    return any((path / inner).is_file() for inner in (CONFIG, f"adapter/{CONFIG}", "resolved.yaml"))


def _name_of(path: Path) -> str:
    whole = path.absolute()
    return whole.parent.name if whole.name == "adapter" and (whole.parent / "resolved.yaml").is_file() else whole.name
