"""The task of predicting the next token of a text, and the base class of all tasks of language models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PreTrainedModel

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings
from randlora.train.tasks.base import (
    IGNORED,
    Outcome,
    Task,
    exp_of,
    from_pretrained,
    is_text,
    one_column,
    require_column,
)
from randlora.train.tasks.quantized import weights_as
from randlora.train.tasks.texts import renamed


class Language(Task):
    """Base class of the tasks of language models."""

    model_type = "CAUSAL_LM"
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity")

    def load_model(self, settings: TrainSettings, labels: list[str], processor: Any) -> PreTrainedModel:
        """Return the pretrained model with its own head.

        Raises:
            ConfigError: if the model looks ahead, as encoders do.
        """
        model: PreTrainedModel = from_pretrained(AutoModelForCausalLM, settings, **weights_as(settings))
        if looks_ahead(model):
            raise ConfigError(
                f"model={settings.model!r} is of type {model.config.model_type!r} and sees the tokens that it is to "
                f"predict, as encoders do: task={settings.task!r} needs a model that only sees what stands before"
            )
        return model

    def collator(self, processor: Any) -> Callable[[Any], Any]:
        """Return a function that pads a batch to its longest text; padding has no loss."""
        return DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)

    def reduce(self, logits: Any, labels: Any) -> Tensor:
        """Return (batch, 2): the summed loss of each example, and the number of its labelled tokens."""
        scores = logits[0] if isinstance(logits, tuple) else logits
        wanted = labels[:, 1:]
        losses = functional.cross_entropy(
            scores[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
        )
        return torch.stack([losses.sum(-1), (wanted != IGNORED).sum(-1).to(losses.dtype)], dim=-1)

    def outcome(self, kept: np.ndarray, targets: np.ndarray, labels: list[str]) -> Outcome:
        """Return the loss per token, and the perplexity."""
        total, tokens = kept.astype(np.float64).sum(0)
        loss = float(total / tokens)
        return Outcome({"loss": loss, "perplexity": exp_of(loss)}, int(tokens))

    def records(
        self, rows: Dataset, prepared: Dataset, kept: np.ndarray, labels: list[str], processor: Any
    ) -> Iterable[dict[str, Any]]:
        """Yield the text and loss of each example; the confidence is the geometric mean of token probabilities."""
        texts = processor.batch_decode(prepared["input_ids"][:])
        for text, (total, tokens) in zip(texts, kept.tolist(), strict=True):
            loss = total / max(tokens, 1.0)
            yield {"text": text, "confidence": 1 / exp_of(loss), "loss": loss, "tokens": int(tokens)}


class CausalLanguage(Language):
    """Training on all tokens of a text."""

    name = "causal-lm"
    input_column = "text"

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the column ``text``.

        Raises:
            ConfigError: if the settings name a column of labels, or the column of texts is missing or none.
        """
        if settings.label_column is not None:
            raise ConfigError(
                f"label_column={settings.label_column!r}: causal-lm learns each text as a whole and reads no labels: "
                "leave it out, or learn answers to prompts by task='chat'"
            )
        column = one_column("input_column", settings, "text")
        require_column(rows, column, "input_column", source, is_text)
        return renamed(rows, {"text": column})

    def identities(self, rows: Dataset) -> list[str]:
        """Return the texts."""
        return list(rows["text"])

    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Return the tokens of texts, each closed by the end-of-text token; packed unless the settings forbid it.

        Raises:
            ConfigError: if no text has two tokens.
        """
        end = [] if processor.eos_token_id is None else [processor.eos_token_id]
        texts = [[*ids, *end] for ids in processor(rows["text"][:], add_special_tokens=False)["input_ids"]]
        if settings.packing is not False:
            return packed(texts, texts, settings.max_length)
        cut = [ids[: settings.max_length] for ids in texts if len(ids) > 1]
        if not cut:
            raise ConfigError(f"none of the {len(texts)} texts has two tokens or more: nothing to predict")
        return as_dataset(cut, cut)


@torch.no_grad()
def looks_ahead(model: PreTrainedModel) -> bool:
    """Return whether a model's output for a token depends on later tokens."""
    training, device = model.training, next(model.parameters()).device
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=device) % model.config.get_text_config().vocab_size
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):  # bitsandbytes' would repack its codes for inference, for good
            module.train()
    one, other = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    model.train(training)
    rounding = 1e-5 if model.dtype is torch.float32 else 1e-2
    return bool((one - other).abs().max() > rounding * one.abs().max())


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a prompt, without the end-of-text token that some tokenizers add to every text."""
    ids: list[int] = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    closed = end is not None and ids[-1:] == [end] and tokenizer.bos_token_id != end
    return ids[:-1] if closed else ids


def packed(ids: list[list[int]], labels: list[list[int]], length: int) -> Dataset:
    """Return texts joined and cut into chunks of ``length``; a shorter rest is kept only if there is no whole chunk.

    Raises:
        ConfigError: if there are fewer than two tokens.
    """
    all_ids, all_labels = ([token for text in texts for token in text] for texts in (ids, labels))
    whole = len(all_ids) // length * length or len(all_ids)
    if whole < 2:
        raise ConfigError(f"the data holds {whole} tokens of text: nothing to predict")
    starts = range(0, whole, length)
    return as_dataset(
        [all_ids[start : min(start + length, whole)] for start in starts],
        [all_labels[start : min(start + length, whole)] for start in starts],
    )


def as_dataset(ids: list[list[int]], labels: list[list[int]]) -> Dataset:
    """Return rows of tokens with an attention mask of ones."""
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "attention_mask": [[1] * len(one) for one in ids]})
