"""Conversion of published shapes of conversations, Alpaca's columns and ShareGPT's turns, to messages."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from randlora.errors import ConfigError
from randlora.train.tasks.base import is_text, require_column

_ALPACA = ("instruction", "output")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def fields_of(feature: Any) -> set[str]:
    """Return the keys of the mappings in a list; an empty set for other features."""
    inner = getattr(feature, "feature", None)
    if inner is None and isinstance(feature, list) and feature:
        inner = feature[0]
    return set(inner) if isinstance(inner, dict) else set()


def as_messages(rows: Dataset, column: str | None, source: str) -> Dataset:
    """Return the column ``messages``, made from Alpaca's columns or ShareGPT's column; other data unchanged.

    Args:
        rows: the data.
        column: name of the column of conversations, by default ``conversations``.
        source: the file, folder or name of the data, for error messages.

    Raises:
        ConfigError: if a value is missing, or a turn is neither the user's nor the assistant's.
    """
    shared = column or "conversations"
    if fields_of(rows.features.get(shared)) >= {"from", "value"}:
        turns = [[_turn(one, source) for one in row] for row in rows[shared]]
        return Dataset.from_dict({column or "messages": turns})
    if column is None and "messages" not in rows.column_names and set(_ALPACA) <= set(rows.column_names):
        for name in _ALPACA:
            require_column(rows, name, "input_column", source, is_text)
        given = rows["input"] if "input" in rows.column_names else [None] * len(rows)
        parts = zip(rows["instruction"], given, rows["output"], strict=True)
        return Dataset.from_dict({"messages": [_pair(*one) for one in parts]})
    return rows


def _turn(turn: dict[str, Any], source: str) -> dict[str, str]:
    role = _ROLES.get(str(turn["from"]))
    if role is None or turn["value"] is None:
        raise ConfigError(
            f"{source!r} has a turn of {turn['from']!r}: {turn['value']!r}; known are {', '.join(_ROLES)}"
        )
    return {"role": role, "content": turn["value"]}


def _pair(instruction: str, given: str | None, output: str) -> list[dict[str, str]]:
    asked = f"{instruction}\n\n{given}" if given else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
