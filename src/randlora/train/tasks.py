"""Sequence classification and causal language modelling: model, tokens, batches and metrics of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings


def load_tokenizer(settings: TrainSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token."""
    tokenizer = _from_pretrained(AutoTokenizer, settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: TrainSettings, labels: list[str], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The pretrained model with the task's head, in float32."""
    if settings.task == "causal-lm":
        return _from_pretrained(AutoModelForCausalLM, settings, dtype="float32")
    model = _from_pretrained(
        AutoModelForSequenceClassification,
        settings,
        dtype="float32",
        ignore_mismatched_sizes=True,  # a head for other labels than ours is replaced by a new one
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def require_length(model: PreTrainedModel, settings: TrainSettings) -> None:
    """Refuses inputs longer than the model has positions for.

    Raises:
        ConfigError: naming both lengths.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.max_length > positions:
        raise ConfigError(f"max_length={settings.max_length}: {settings.model!r} takes at most {positions} tokens")


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, settings: TrainSettings) -> Dataset:
    """Examples as the model takes them.

    Classification: one text each, cut at ``max_length``. Causal language modelling: all texts, each closed by the
    end-of-text token, joined and cut into chunks of ``max_length``; a shorter rest is kept only if it is all there is.

    Raises:
        ConfigError: if no text is left to learn from.
    """
    if settings.task == "sequence-classification":
        return data.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=settings.max_length),
            batched=True,
            remove_columns=["text"],
        )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [
        token for text in tokenizer(data["text"][:], add_special_tokens=False)["input_ids"] for token in [*text, *end]
    ]
    length = settings.max_length
    whole = len(ids) // length * length or len(ids)
    chunks = [ids[start : start + length] for start in range(0, whole, length)]
    if whole < 2:
        raise ConfigError(f"the data holds {whole} tokens of text: nothing to predict")
    return Dataset.from_dict({"input_ids": chunks, "labels": chunks, "attention_mask": [[1] * len(c) for c in chunks]})


def collator(tokenizer: PreTrainedTokenizerBase, settings: TrainSettings) -> Callable[[Any], Any]:
    """Makes a batch of examples: padded to the longest for classification, of equal length otherwise."""
    return DataCollatorWithPadding(tokenizer) if settings.task == "sequence-classification" else default_data_collator


def metrics(settings: TrainSettings) -> Callable[[Any], dict[str, float]] | None:
    """Accuracy for classification; causal language modelling has its loss."""
    if settings.task == "causal-lm":
        return None
    return lambda prediction: {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def reduce_logits(settings: TrainSettings) -> Callable[[Any, Any], Any] | None:
    """For causal language modelling, makes of a batch's logits the mean loss (batch,) of each chunk's tokens."""
    return None if settings.task == "sequence-classification" else _chunk_losses


def with_perplexity(evaluation: dict[str, float], settings: TrainSettings) -> dict[str, float]:
    """Adds the perplexity, e to the loss per token, of causal language modelling."""
    if settings.task == "causal-lm":
        evaluation = {**evaluation, "eval_perplexity": math.exp(min(evaluation["eval_loss"], 700.0))}
    return evaluation


def _chunk_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    scores = logits[0] if isinstance(logits, tuple) else logits
    tokens = functional.cross_entropy(scores[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return tokens.mean(-1)


def _from_pretrained(auto_class: Any, settings: TrainSettings, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code, **kwargs)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model={settings.model!r} is neither a folder that {auto_class.__name__} can load nor a model of the hub "
            f"within reach: {str(error).strip()}"
        ) from error
