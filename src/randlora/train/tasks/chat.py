"""The task of answering in conversations: the loss counts only the tokens of answers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings
from randlora.train.tasks.base import IGNORED, is_text, require_column
from randlora.train.tasks.chat_shapes import as_messages, fields_of
from randlora.train.tasks.language import Language, as_dataset, packed, prompt_tokens
from randlora.train.tasks.texts import renamed

_PAIR = ("prompt", "completion")
_REWRITES = (
    "the chat template writes earlier turns anew when a conversation goes on, so that it cannot be said which tokens "
    "are the answer's: give each answer as an example of its own (prompt, completion), or another chat_template"
)

Said: TypeAlias = str | list[dict[str, Any]]
"""Text, or messages with ``role`` and ``content``."""


class Chat(Language):
    """Training on the answers in conversations.

    The data has a column of messages, each with ``role`` and ``content``, which the tokenizer's chat template turns
    into text; or the columns ``prompt`` and ``completion``, of text or of messages; or Alpaca's or ShareGPT's shape
    (``chat_shapes.py``).
    """

    name = "chat"
    input_column = "messages"

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the column ``messages``, or the columns ``prompt`` and ``completion``."""
        rows, named = _renamed_parts(rows, settings, source)
        rows = as_messages(rows, named, source)
        column = named or "messages"
        if column not in rows.column_names and set(_PAIR) <= set(rows.column_names):
            for name in _PAIR:
                require_column(rows, name, "input_column", source, lambda one: is_text(one) or _is_messages(one))
            return rows.select_columns(list(_PAIR))
        require_column(rows, column, "input_column", source, _is_messages)
        return renamed(rows, {"messages": column})

    def identities(self, rows: Dataset) -> list[str]:
        """Return each conversation as JSON."""
        return [json.dumps(row, sort_keys=True) for row in rows]

    def load_processor(self, settings: TrainSettings) -> Any:
        """Return the tokenizer, with the chat template of the settings if they name one.

        Raises:
            ConfigError: if the template or the tokenizer cannot be read.
        """
        tokenizer = super().load_processor(settings)
        if settings.chat_template is not None:
            try:
                tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(
                    f"chat_template={settings.chat_template!r} cannot be read: {error.strerror}"
                ) from None
        return tokenizer

    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Return tokens, with labels only for the tokens of answers.

        Raises:
            ConfigError: if no example has an answer within ``max_length``.
        """
        ids, labels = [], []
        for row in rows:
            found, wanted = _tokens(row, processor)
            ids.append(found[: settings.max_length])
            labels.append(wanted[: settings.max_length])
        kept = [number for number, wanted in enumerate(labels) if any(label != IGNORED for label in wanted[1:])]
        if not kept:
            raise ConfigError(
                f"none of the {len(labels)} examples has an answer within max_length={settings.max_length} tokens"
            )
        if len(kept) < len(labels):
            warnings.warn(
                f"{len(labels) - len(kept)} of {len(labels)} examples have no answer within "
                f"max_length={settings.max_length} tokens and are left out",
                stacklevel=2,
            )
        ids, labels = [ids[number] for number in kept], [labels[number] for number in kept]
        return packed(ids, labels, settings.max_length) if settings.packing else as_dataset(ids, labels)


def _renamed_parts(rows: Dataset, settings: TrainSettings, source: str) -> tuple[Dataset, str | None]:
    """Return the rows with prompts and completions, or Alpaca's columns, under their usual names; and the column of
    conversations, if the settings name one."""
    given, answers = settings.input_column, settings.label_column
    if answers is None:
        if isinstance(given, list):
            raise ConfigError(f"input_column={given} are an instruction and its input: name its output by label_column")
        return rows, given
    asked = ["prompt" if given is None else given] if not isinstance(given, list) else given
    columns = [*asked, str(answers)]
    settings_of = ["input_column"] * len(asked) + ["label_column"]
    for number, (column, setting) in enumerate(zip(columns, settings_of, strict=True)):
        needed = rows.select([]) if (number, len(asked)) == (1, 2) else rows  # an instruction may have no input
        require_column(needed, column, setting, source, lambda one: is_text(one) or _is_messages(one))
    names = [*_PAIR] if len(asked) == 1 else ["instruction", "input", "output"]
    return renamed(rows, dict(zip(names, columns, strict=True))), None


def _tokens(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of an example, and its labels."""
    if "messages" in row:
        return _conversation(row["messages"], tokenizer)
    prompt, completion = (row[name] for name in _PAIR)
    if isinstance(prompt, str) and isinstance(completion, str):
        asked, answer = _text_tokens(prompt, completion, tokenizer)
        return [*asked, *answer], [IGNORED] * len(asked) + answer
    both = [
        *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt),
        *([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion),
    ]
    return _conversation(both, tokenizer)


def prompt_and_answer(prompt: Said, answer: Said, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt and of its answer, both text or both messages, as in training.

    Raises:
        ConfigError: if there is no chat template for messages, or the template rewrites the prompt before an answer.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return _text_tokens(prompt, answer, tokenizer)
    _require_template(tokenizer)
    before = templated(prompt, tokenizer, add_generation_prompt=True)
    after = templated([*prompt, *answer], tokenizer)
    if not after.startswith(before):
        raise ConfigError(_REWRITES)
    ids = tokens_of(after, tokenizer)
    start = _shared(ids, tokens_of(before, tokenizer))
    return ids[:start], ids[start:]


def _text_tokens(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt and of the completion, which the end-of-text token closes."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return prompt_tokens(tokenizer, prompt), [*tokenizer(completion, add_special_tokens=False)["input_ids"], *end]


def _require_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: name a file with one by chat_template, "
            "or give prompts and answers as text"
        )


def _conversation(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation, and labels: the tokens that each turn of the assistant adds."""
    _require_template(tokenizer)
    text = templated(messages, tokenizer)
    ids = tokens_of(text, tokenizer)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = templated(messages[:turn], tokenizer, add_generation_prompt=True)
        after = templated(messages[: turn + 1], tokenizer)
        if not (text.startswith(after) and after.startswith(before)):
            raise ConfigError(_REWRITES)
        # a blank at the end of the prompt may be in one token with the answer's first word
        start, end = (_shared(ids, tokens_of(one, tokenizer)) for one in (before, after))
        labels[start:end] = ids[start:end]
    return ids, labels


def templated(messages: Said, tokenizer: Any, **arguments: Any) -> str:
    """Return the text that the tokenizer's chat template makes of messages.

    Raises:
        ConfigError: if the template cannot write them.
    """
    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
    except Exception as error:  # errors of Jinja, and errors that templates raise
        raise ConfigError(f"the chat template cannot write {messages!r:.200}: {error}") from error


def tokens_of(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a template's text, which includes all special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the token by which the chat template closes an answer; ``None`` if that is not one special token."""
    asked = [{"role": "user", "content": "anything"}]
    answered = templated([*asked, {"role": "assistant", "content": "xyzzy"}], tokenizer)
    before = templated(asked, tokenizer, add_generation_prompt=True)
    tail = tokens_of(answered[len(before) :].partition("xyzzy")[2].lstrip(), tokenizer)
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return tail[0] if answered.startswith(before) and tail and tail[0] in marks else None


def _shared(one: list[int], other: list[int]) -> int:
    """Return the number of tokens that both lists begin with."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _is_messages(feature: Any) -> bool:
    return fields_of(feature) >= {"role", "content"}
