"""The task of giving a tag to each word of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, PreTrainedModel

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings
from randlora.train.tasks.base import (
    IGNORED,
    Outcome,
    Task,
    from_pretrained,
    is_text,
    log_shares,
    one_column,
    require_column,
)
from randlora.train.tasks.classification import is_label, numbers_of
from randlora.train.tasks.quantized import weights_as
from randlora.train.tasks.texts import renamed


class TokenClassification(Task):
    """Classification of words. The first piece of a word has the tag; the other pieces have no loss."""

    name = "token-classification"
    model_type = "TOKEN_CLS"
    input_column = "tokens"
    label_column = "tags"
    metric_names = ("loss", "accuracy", "precision", "recall", "f1")
    loss_is_mean = True

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the columns ``tokens`` and ``tags``; both lists of a row have the same length."""
        columns = {
            "tokens": one_column("input_column", settings, "tokens"),
            "tags": one_column("label_column", settings, "tags"),
        }
        require_column(rows, columns["tokens"], "input_column", source, lambda one: is_text(_inner(one)))
        require_column(rows, columns["tags"], "label_column", source, lambda one: is_label(_inner(one)))
        rows = renamed(rows, columns)
        for number, row in enumerate(rows):
            if len(row["tokens"]) != len(row["tags"]):
                raise ConfigError(
                    f"row {number} of {source!r} has {len(row['tokens'])} tokens and {len(row['tags'])} tags"
                )
        return rows

    def inputs(self, rows: Dataset, settings: TrainSettings, source: str) -> list[Any]:
        """Return texts: a column of text, or a column of lists of words, joined by spaces."""
        column = one_column("input_column", settings, "tokens" if "tokens" in rows.column_names else "text")
        require_column(rows, column, "input_column", source, lambda one: is_text(one) or is_text(_inner(one)))
        return [text if isinstance(text, str) else " ".join(text) for text in rows[column]]

    def identities(self, rows: Dataset) -> list[str]:
        """Return the words of each row, joined by spaces."""
        return [" ".join(tokens) for tokens in rows["tokens"]]

    def labels(self, rows: Dataset) -> list[str]:
        """Return the names of the tags: those that the data gives, or its values in order.

        Raises:
            ConfigError: if there are fewer than two tags.
        """
        inner = _inner(rows.features["tags"])
        if isinstance(inner, ClassLabel):
            return list(inner.names)
        found = sorted({tag for tags in rows["tags"] for tag in tags})
        if len(found) < 2:
            raise ConfigError(f"the training data has the tags {found}; a classifier needs two or more")
        return [str(tag) for tag in found]

    def encode(self, rows: Dataset, labels: list[str]) -> Dataset:
        """Return the rows with tags as numbers, by their names."""
        inner = _inner(rows.features["tags"])
        named = isinstance(inner, ClassLabel)
        numbers = [numbers_of([inner.int2str(tag) for tag in tags] if named else tags, labels) for tags in rows["tags"]]
        return rows.remove_columns("tags").add_column("tags", numbers)

    def load_processor(self, settings: TrainSettings) -> Any:
        """Return a tokenizer that tells the word of each token.

        Raises:
            ConfigError: if the model has none.
        """
        tokenizer = super().load_processor(settings)
        if not tokenizer.is_fast:
            raise ConfigError(
                f"model={settings.model!r} has a tokenizer that does not say which word a token is of; "
                "token-classification needs a fast one (tokenizer.json)"
            )
        if getattr(tokenizer, "add_prefix_space", True) is False:
            tokenizer.add_prefix_space = True  # words come one by one
        return tokenizer

    def load_model(self, settings: TrainSettings, labels: list[str], processor: Any) -> PreTrainedModel:
        """Return the pretrained model with a head for ``labels``."""
        return from_pretrained(AutoModelForTokenClassification, settings, **self.head(labels), **weights_as(settings))

    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Return words as tokens, cut at ``max_length``, with a label for the first token of each word."""

        def pieces(batch: dict[str, Any]) -> dict[str, Any]:
            found = processor(
                batch["tokens"], is_split_into_words=True, truncation=True, max_length=settings.max_length
            )
            labels = [
                [IGNORED if word is None else tags[word] for word in first_pieces(found.word_ids(number))]
                for number, tags in enumerate(batch["tags"])
            ]
            return {**found, "labels": labels}

        return rows.map(pieces, batched=True, remove_columns=rows.column_names)

    def collator(self, processor: Any) -> Callable[[Any], Any]:
        """Return a function that pads a batch to its longest text; padding has no loss."""
        return DataCollatorForTokenClassification(processor, label_pad_token_id=IGNORED)

    def outcome(self, kept: np.ndarray, targets: np.ndarray, labels: list[str]) -> Outcome:
        """Return the accuracy of tags; where tags are named as in IOB, also precision, recall and F1 of entities."""
        counted = targets != IGNORED
        shares = log_shares(kept[counted])
        wanted = targets[counted]
        hits = shares.argmax(-1) == wanted
        metrics = {
            "loss": float(-np.take_along_axis(shares, wanted[:, None], -1).mean()),
            "accuracy": float(hits.mean()),
        }
        if any(label.startswith("B-") for label in labels):
            metrics |= _entities(kept.argmax(-1), targets, labels)
        by_label = {
            name: (int((wanted == number).sum()), int(hits[wanted == number].sum()))
            for number, name in enumerate(labels)
        }
        return Outcome(metrics, int(counted.sum()), int(hits.sum()), by_label)

    def records(
        self, rows: Dataset, prepared: Dataset, kept: np.ndarray, labels: list[str], processor: Any
    ) -> Iterable[dict[str, Any]]:
        """Yield the words, the tags and the predicted tags; the confidence is that of the least certain tag."""
        for text, targets, logits in zip(self.identities(rows), prepared["labels"], kept, strict=True):
            counted = [place for place, label in enumerate(targets) if label != IGNORED]
            shares = log_shares(logits[counted])
            wanted = [targets[place] for place in counted]
            guessed = shares.argmax(-1).tolist()
            yield {
                "text": text,
                "label": " ".join(labels[one] for one in wanted),
                "predicted": " ".join(labels[one] for one in guessed),
                "confidence": float(np.exp(shares.max(-1).min(initial=0.0))),
                "loss": float(-shares[range(len(wanted)), wanted].mean()) if wanted else 0.0,
                "tokens": len(wanted),
                "correct": sum(one == guess for one, guess in zip(wanted, guessed, strict=True)),
            }


def first_pieces(words: list[int | None]) -> list[int | None]:
    """Return, for each token, the number of its word if the token is the first of that word, else ``None``."""
    return [word if place == 0 or words[place - 1] != word else None for place, word in enumerate(words)]


def _inner(feature: Any) -> Any:
    """Return the feature of the elements of a list; ``None`` for other features."""
    return getattr(feature, "feature", None)


def _entities(guessed: np.ndarray, targets: np.ndarray, labels: list[str]) -> dict[str, float]:
    from seqeval.metrics import f1_score, precision_score, recall_score  # noqa: PLC0415 - only this task needs it

    right = [[labels[one] for one in row if one != IGNORED] for row in targets]
    found = [
        [labels[guess] for guess, one in zip(guesses, row, strict=True) if one != IGNORED]
        for guesses, row in zip(guessed, targets, strict=True)
    ]
    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    return {name: float(score(right, found, zero_division=0)) for name, score in scores.items()}
