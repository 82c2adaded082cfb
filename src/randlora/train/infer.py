"""Labels for texts, scores on data, and text that goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TextStreamer

from randlora.errors import ConfigError
from randlora.train import tasks
from randlora.train.data import load_data, load_rows
from randlora.train.settings import TrainSettings
from randlora.train.trained import Trained


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of a text.

    Attributes:
        text: the text.
        label: the most probable label.
        probabilities: by label.
    """

    text: str
    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Score:
    """How well a model does on data.

    Attributes:
        task: what was asked of it.
        examples: texts; chunks of tokens for causal language modelling.
        tokens: number of predicted tokens; 0 for classification.
        loss: mean of the examples' cross-entropies, of the tokens' for causal language modelling.
        correct: examples with the right label; ``None`` for causal language modelling.
        by_label: for each label how many examples have it, and how many of these were found.
    """

    task: str
    examples: int
    tokens: int
    loss: float
    correct: int | None
    by_label: dict[str, tuple[int, int]]

    @property
    def metrics(self) -> dict[str, float]:
        """Loss, and accuracy or perplexity."""
        if self.correct is not None:
            return {"loss": self.loss, "accuracy": self.correct / self.examples}
        return {"loss": self.loss, "perplexity": math.exp(min(self.loss, 700.0))}


def predict_texts(trained: Trained, texts: Sequence[str], batch_size: int = 32) -> Iterator[Prediction]:
    """Labels of texts, in their order.

    Raises:
        ConfigError: if the model is no classifier.
    """
    _require(trained, "sequence-classification", "predict")
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        for text, logits in zip(batch, _logits(trained, batch), strict=True):
            shares = dict(zip(trained.labels, logits.softmax(-1).tolist(), strict=True))
            yield Prediction(text, max(shares, key=lambda label: shares[label]), shares)


def score(
    trained: Trained,
    data: str | None = None,
    batch_size: int = 32,
    text_column: str = "text",
    label_column: str = "label",
) -> Score:
    """Scores a model on data.

    Args:
        trained: the model.
        data: a file, folder or name on the hub, as for training; ``None`` takes the evaluation data of its run.
        batch_size: examples at a time.
        text_column: column of the texts.
        label_column: column of the labels.

    Raises:
        ConfigError: if the data cannot be read, or has labels that the model does not know.
    """
    settings = trained.run
    if data is not None:
        settings = TrainSettings(
            model=trained.base,
            data=data,
            task=trained.task,
            text_column=text_column,
            label_column=label_column,
            max_length=max(trained.max_length, 2),
        )
        rows = load_rows(data, settings)
    elif settings is None:
        raise ConfigError(f"{trained.path} belongs to no run that would say on what to score it: name data")
    else:
        rows = load_data(settings).evaluation
    if trained.task == "causal-lm":
        return _score_language(trained, tasks.tokenize(rows, trained.tokenizer, settings), batch_size)
    return _score_labels(trained, list(rows["text"]), _numbers(rows["label"], trained.labels), batch_size)


def generate_text(
    trained: Trained,
    prompt: str | list[dict[str, str]],
    on_text: Callable[[str], None],
    max_new_tokens: int = 200,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int | None = None,
) -> str:
    """Goes on from a prompt, or answers a conversation by the tokenizer's chat template.

    Args:
        trained: a causal language model.
        prompt: text, or messages with ``role`` and ``content``.
        on_text: is given each piece of text when it is there.
        max_new_tokens: most tokens to write.
        temperature: of the sampling; 0 always takes the most probable token.
        top_p: the most probable tokens that together have this probability are sampled from.
        seed: of the sampling; ``None`` takes another each time.

    Returns:
        What was written.

    Raises:
        ConfigError: if the model is none of language, or a value cannot mean anything.
    """
    _require(trained, "causal-lm", "generate")
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ConfigError(
            f"temperature={temperature}, top_p={top_p}, max_new_tokens={max_new_tokens}: they must be at least 0, "
            "above 0 and up to 1, and at least 1"
        )
    tokenizer: Any = trained.tokenizer
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    if not inputs["input_ids"].numel():
        raise ConfigError("the prompt is empty: there is nothing to go on from")
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        on_text(text)

    names = ("input_ids", "attention_mask")
    with torch.inference_mode():
        trained.model.generate(
            **{name: inputs[name].to(trained.model.device) for name in names if name in inputs},
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=_Streamer(tokenizer, take),
            **sampling,
        )
    return "".join(pieces)


class _Streamer(TextStreamer):
    """Hands each piece of new text on."""

    def __init__(self, tokenizer: Any, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._take(text)


def _require(trained: Trained, task: str, command: str) -> None:
    if trained.task != task:
        raise ConfigError(f"{command} is for {task}, and the model in {trained.path} is for {trained.task}")


@torch.inference_mode()
def _logits(trained: Trained, texts: list[str]) -> Tensor:
    """(texts, labels), in float32 on the CPU."""
    inputs = trained.tokenizer(
        texts, padding=True, truncation=True, max_length=trained.max_length, return_tensors="pt"
    ).to(trained.model.device)
    return trained.model(**inputs).logits.float().cpu()


def _numbers(labels: Sequence[Any], known: tuple[str, ...]) -> list[int]:
    """Labels as the model counts them; they are names, or, as in `datasets`, numbers already."""
    numbers = {name: number for number, name in enumerate(known)}
    if all(isinstance(label, int) and str(label) not in numbers and label < len(known) for label in labels):
        return list(labels)
    unknown = sorted({str(label) for label in labels} - set(numbers))
    if unknown:
        raise ConfigError(f"the data has labels that the model does not know: {unknown}; it knows {list(known)}")
    return [numbers[str(label)] for label in labels]


def _score_labels(trained: Trained, texts: list[str], labels: list[int], batch_size: int) -> Score:
    loss, hits = 0.0, []
    for start in range(0, len(texts), batch_size):
        logits = _logits(trained, texts[start : start + batch_size])
        wanted = torch.tensor(labels[start : start + batch_size])
        loss += float(functional.cross_entropy(logits, wanted, reduction="sum"))
        hits += (logits.argmax(-1) == wanted).tolist()
    by_label = {
        name: (labels.count(number), sum(hit for hit, label in zip(hits, labels, strict=True) if label == number))
        for number, name in enumerate(trained.labels)
    }
    return Score(trained.task, len(texts), 0, loss / len(texts), sum(hits), by_label)


@torch.inference_mode()
def _score_language(trained: Trained, chunks: Any, batch_size: int) -> Score:
    loss, tokens = 0.0, 0
    for start in range(0, len(chunks), batch_size):
        ids = torch.tensor(chunks[start : start + batch_size]["input_ids"]).to(trained.model.device)
        logits = trained.model(input_ids=ids).logits[:, :-1].float()
        loss += float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        tokens += ids[:, 1:].numel()
    return Score(trained.task, len(chunks), tokens, loss / tokens, None, {})
