"""Whether the values of a config, which may come from a stranger's file, are of the types that its fields say."""

from __future__ import annotations

import os
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def type_faults(config: Any) -> list[str]:
    """Return one sentence for each field of the dataclass ``config`` whose value does not have the type of its hint."""
    hints = get_type_hints(type(config))
    return [
        f"{name}={value!r:.80} must be {_in_words(hints[name])}"
        for name, value in vars(config).items()
        if name in hints and not _fits(value, hints[name])
    ]


def _fits(value: object, hint: Any) -> bool:
    """Return whether a value fits: sets and tuples count as lists, integers as floats, paths as strings."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or origin is Literal:  # choices are checked where their meaning is
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list | tuple | set | frozenset) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items()
        )
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, (str, os.PathLike) if hint is str else hint)


def _in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(argument) for argument in arguments)
    return "None" if hint is type(None) else str(hint) if origin else getattr(hint, "__name__", str(hint))
