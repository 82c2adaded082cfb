"""Conversion of published shapes of preferences to pairs, or to single answers with a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Value

from randlora.errors import ConfigError
from randlora.train.tasks.base import is_text, require_column
from randlora.train.tasks.chat import Said
from randlora.train.tasks.chat_shapes import fields_of

PAIR = ("prompt", "chosen", "rejected")
SINGLE = ("prompt", "completion", "label")


def as_pairs(rows: Dataset, source: str) -> Dataset:
    """Return the columns ``prompt``, ``chosen`` and ``rejected``; each row has only text, or only messages.

    Where there is no prompt, or where both answers are whole conversations, the prompt is their common beginning.

    Raises:
        ConfigError: if a column is missing or of another kind, or two answers have no prompt in common.
    """
    answers = PAIR[1:]
    if not set(answers) <= set(rows.column_names):
        raise ConfigError(
            f"{source!r} has the columns {', '.join(rows.column_names)}; wanted are prompt, chosen and rejected, or "
            "chosen and rejected that begin with their prompt"
        )
    for name in PAIR:
        if name in rows.column_names:
            _require_said(rows, name, source)
    if is_text(rows.features["chosen"]) != is_text(rows.features["rejected"]):
        raise ConfigError(f"{source!r} has text in one of the columns chosen and rejected, messages in the other")
    pairs = [_pair(row.get("prompt"), row["chosen"], row["rejected"], number, source) for number, row in _rows(rows)]
    return _table(PAIR, pairs)


def as_singles(rows: Dataset, label: str, source: str) -> Dataset:
    """Return the columns ``prompt``, ``completion`` and ``label``, which is true of a good completion.

    A pair becomes two rows. The rows of all chosen answers come first, then those of all rejected ones.

    Args:
        rows: the data.
        label: the column of labels in the data.
        source: the file, folder or name of the data, for messages.

    Raises:
        ConfigError: if a column is missing or of another kind.
    """
    wanted = (*SINGLE[:2], label)
    if not set(wanted) <= set(rows.column_names):
        if set(PAIR[1:]) <= set(rows.column_names):
            if label != SINGLE[2]:
                raise ConfigError(f"label_column={label!r}: {source!r} has pairs of chosen and rejected; leave it out")
            return _apart(as_pairs(rows, source))
        raise ConfigError(
            f"{source!r} has the columns {', '.join(rows.column_names)}; wanted are {', '.join(wanted)}, or prompt, "
            "chosen and rejected"
        )
    for name in SINGLE[:2]:
        _require_said(rows, name, source)
    require_column(rows, label, "label_column", source, _is_flag)
    flags = rows[label][:]
    if not set(flags) <= {0, 1}:
        raise ConfigError(f"column {label!r} of {source!r} holds {sorted(set(flags))[:5]}: wanted are true and false")
    singles = [(*_said(row["prompt"], row["completion"]), bool(flags[number])) for number, row in _rows(rows)]
    return _table(SINGLE, singles)


def _require_said(rows: Dataset, name: str, source: str) -> None:
    feature = rows.features[name]
    if not is_text(feature) and not fields_of(feature) >= {"role", "content"}:
        raise ConfigError(
            f"column {name!r} of {source!r} holds {feature}; wanted is text, or messages with role and content"
        )
    if None in (values := rows[name][:]):
        raise ConfigError(f"{source!r} has no {name!r} in {values.count(None)} rows, first in row {values.index(None)}")


def _is_flag(feature: Any) -> bool:
    return isinstance(feature, Value) and (feature.dtype == "bool" or "int" in feature.dtype)


def _rows(rows: Dataset) -> Any:
    return enumerate(rows.select_columns([name for name in {*PAIR, *SINGLE} if name in rows.column_names]))


def _table(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Dataset:
    return Dataset.from_dict({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def _apart(pairs: Dataset) -> Dataset:
    """Return pairs as single answers, all chosen ones first: neighbours must have different prompts."""
    singles = [(row["prompt"], row[name], name == "chosen") for name in PAIR[1:] for row in pairs]
    return _table(SINGLE, singles)


def _pair(prompt: Said | None, chosen: Said, rejected: Said, row: int, source: str) -> tuple[Said, Said, Said]:
    if isinstance(chosen, str) or isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = _common_text(str(chosen), str(rejected))
    elif prompt is None or (chosen and chosen[0]["role"] != "assistant"):
        same = _common_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if not prompt:
        raise ConfigError(f"chosen and rejected of row {row} of {source!r} do not begin alike, and there is no prompt")
    if not chosen or not rejected:
        raise ConfigError(f"row {row} of {source!r} has a prompt, but an empty answer in chosen or rejected")
    (prompt, chosen), (_, rejected) = _said(prompt, chosen), _said(prompt, rejected)
    return prompt, chosen, rejected


def _said(prompt: Said, answer: Said) -> tuple[Said, Said]:
    """Return prompt and answer, both as text or both as messages."""
    if isinstance(prompt, str) == isinstance(answer, str):
        return prompt, answer
    return (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer,
    )


def _common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    most = min(len(one), len(other))
    return next((place for place in range(most) if one[place] != other[place]), most)


def _common_text(one: str, other: str) -> tuple[str, str, str]:
    """Return the common beginning of two texts, up to a blank, and both rests. The blank goes to the rests: in most
    tokenizers it belongs to the token after it."""
    common = one[: _common_length(one, other)]
    cut = max((place for place, letter in enumerate(common) if letter.isspace()), default=0)
    cut = len(common[:cut].rstrip())
    return one[:cut], one[cut:], other[cut:]
