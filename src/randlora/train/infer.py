"""Inference: labels of texts and images, scores on data, and generated text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import TextStreamer, Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from randlora.errors import ConfigError
from randlora.train.data import Source, load_data, load_rows
from randlora.train.rewards import reward_trainer
from randlora.train.tasks import TASKS, Outcome, Preference, Task
from randlora.train.tasks.chat import Chat, end_of_turn, templated, tokens_of
from randlora.train.tasks.language import prompt_tokens
from randlora.train.tasks.multi_label import THRESHOLD
from randlora.train.tasks.texts import Texts
from randlora.train.tasks.token import first_pieces
from randlora.train.trained import Columns, Trained


@dataclass(frozen=True)
class Prediction:
    """The prediction of a classifier for a text or an image.

    Attributes:
        text: the text, or the path of the image.
        label: the most probable label.
        probabilities: probabilities by label.
        text_pair: the other text of a pair.
    """

    text: str
    label: str
    probabilities: dict[str, float]
    text_pair: str | None = None


@dataclass(frozen=True)
class Labelled:
    """The prediction of a multi-label classifier for a text.

    Attributes:
        text: the text.
        labels: those with a probability above a half.
        probabilities: probability of each label; they need not add up to 1.
        text_pair: the other text of a pair.
    """

    text: str
    labels: list[str]
    probabilities: dict[str, float]
    text_pair: str | None = None


@dataclass(frozen=True)
class Estimate:
    """The prediction of a regression for a text.

    Attributes:
        text: the text.
        value: predicted number, in the unit of the training labels.
        text_pair: the other text of a pair.
    """

    text: str
    value: float
    text_pair: str | None = None


@dataclass(frozen=True)
class Tagged:
    """The prediction of a token classifier for a text.

    Attributes:
        text: the text.
        words: words of the text, split at blanks, as many as fit into the model.
        labels: the most probable tag of each word.
        probabilities: probabilities of these tags.
    """

    text: str
    words: list[str]
    labels: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class Score:
    """The score of a model on data.

    Attributes:
        task: name of the task.
        examples: number of texts or images; of chunks of tokens for language models.
        outcome: metrics and counts.
        intervals: 95% intervals by metric; where ``outcome`` counts right answers, the counts give the interval.
    """

    task: str
    examples: int
    outcome: Outcome
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


Answer: TypeAlias = Prediction | Labelled | Estimate | Tagged


def predict_labels(trained: Trained, given: Sequence[Any], batch_size: int = 32) -> Iterator[Answer]:
    """Yield the prediction for each text or image, in their order.

    Args:
        trained: the model.
        given: texts, or pairs of texts as tuples; or names of image files, or images in the form of ``datasets``,
            with ``path`` and ``bytes``.
        batch_size: number of examples in a forward pass.

    Raises:
        ConfigError: if the model is for another task, or a file is not an image.
    """
    if isinstance(TASKS[trained.task], Texts):
        return _answers(trained, given, batch_size, lambda batch: _tokens(trained, batch))
    if trained.task == "image-classification":
        return _answers(trained, given, batch_size, lambda batch: _pixels(trained, batch))
    if trained.task == "token-classification":
        return _tagged(trained, given, batch_size)
    raise ConfigError(f"predict is for classifiers, and the model in {trained.path} is for {trained.task}")


def predict(
    model: Any, examples: Any, task: Task, processor: Any, batch_size: int, kind: type[Trainer] = Trainer
) -> PredictionOutput:
    """Return the predictions of a model for prepared examples, gathered by a Trainer of class ``kind``."""
    with tempfile.TemporaryDirectory() as nothing:
        trainer = kind(
            model=model,
            args=TrainingArguments(
                output_dir=nothing,
                per_device_eval_batch_size=batch_size,
                use_cpu=not torch.accelerator.is_available(),
                remove_unused_columns=task.counts_tokens and not isinstance(task, Preference),
                dataloader_pin_memory=False,
                disable_tqdm=True,
                report_to=[],
            ),
            data_collator=task.collator(processor),
            preprocess_logits_for_metrics=task.reduce,
        )
        return trainer.predict(examples)


def score(
    trained: Trained,
    data: Source | None = None,
    batch_size: int = 32,
    input_column: Columns = None,
    label_column: Columns = None,
    encoding: str | None = None,
) -> Score:
    """Return the score of a model on data.

    Args:
        trained: the model.
        data: files, folders or names on the hub, as for training; ``None`` takes the evaluation data of its run.
        batch_size: number of examples in a forward pass.
        input_column: column of the input, as for training; by default the run's.
        label_column: column of the labels, likewise.
        encoding: encoding of ``data``, where it is files of text; UTF-8 if ``None``.

    Raises:
        ConfigError: if the data cannot be read, or has labels that the model does not know; or if there is no reference
            for rewards.
    """
    task, labels, settings = TASKS[trained.task], list(trained.labels), trained.run
    if data is not None:
        settings = trained.settings_for(data, input_column, label_column, encoding)
        rows = task.encode(load_rows(data, settings), labels)
    elif settings is None:
        raise ConfigError(f"{trained.path} belongs to no run that would say on what to score it: name data")
    else:
        rows = load_data(settings).evaluation
    kind = reward_trainer(task, trained, settings) if isinstance(task, Preference) else Trainer
    examples = task.prepare(rows, trained.processor, settings)
    found = predict(trained.model, examples, task, trained.processor, batch_size, kind)
    kept, targets = np.asarray(found.predictions), np.asarray(found.label_ids)
    return Score(trained.task, len(examples), task.outcome(kept, targets, labels), task.intervals(kept, targets))


def generate_text(
    trained: Trained,
    prompt: str | list[dict[str, str]],
    on_text: Callable[[str], None],
    max_new_tokens: int = 200,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int | None = None,
) -> str:
    """Return text that continues a prompt, or answers a conversation by the tokenizer's chat template.

    A chat model with a template takes a text as the first message of a conversation.

    Args:
        trained: a causal language model.
        prompt: text, or messages with ``role`` and ``content``.
        on_text: called with each new piece of text.
        max_new_tokens: most tokens to write; fewer where the model runs out of positions.
        temperature: temperature of the sampling; 0 always takes the most probable token.
        top_p: total probability of the most probable tokens, among which a token is sampled.
        seed: seed of the sampling; ``None`` samples differently in each call.

    Returns:
        The new text, without the prompt.

    Raises:
        ConfigError: if the model is not a language model, a value is out of range, or the prompt is empty or too long.
    """
    if TASKS[trained.task].model_type != "CAUSAL_LM":
        raise ConfigError(f"generate is for language models, and the model in {trained.path} is for {trained.task}")
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ConfigError(
            f"temperature={temperature}, top_p={top_p}, max_new_tokens={max_new_tokens}: they must be at least 0, "
            "above 0 and up to 1, and at least 1"
        )
    tokenizer: Any = trained.processor
    if isinstance(TASKS[trained.task], Chat) and tokenizer.chat_template and isinstance(prompt, str) and prompt:
        prompt = [{"role": "user", "content": prompt}]
    asked = asked_tokens(tokenizer, prompt)
    ends = [] if isinstance(prompt, str) else answer_ends(trained)
    ids = torch.tensor([asked], device=trained.model.device)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        on_text(text)

    with torch.inference_mode():
        trained.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room(trained, len(asked), max_new_tokens),
            pad_token_id=tokenizer.pad_token_id,
            streamer=_Streamer(tokenizer, take),
            **sampling,
            **({"eos_token_id": ends} if ends else {}),
        )
    return "".join(pieces)


def asked_tokens(tokenizer: Any, prompt: str | list[dict[str, Any]], **arguments: Any) -> list[int]:
    """Return the tokens of a text, or of messages up to the beginning of the answer, by the chat template.

    Args:
        tokenizer: the model's tokenizer.
        prompt: text, or messages with ``role`` and ``content``.
        **arguments: arguments of the chat template, such as ``tools``.

    Raises:
        ConfigError: if there are no tokens, or the template cannot write the messages.
    """
    if isinstance(prompt, str):
        asked = prompt_tokens(tokenizer, prompt)
    else:  # without its last blank, which in training was part of the answer's first token
        text = templated(prompt, tokenizer, add_generation_prompt=True, **arguments)
        asked = tokens_of(text.rstrip(" "), tokenizer)
    if not asked:
        raise ConfigError("the prompt is empty: there is nothing to go on from")
    return asked


def answer_ends(trained: Trained) -> list[int]:
    """Return the tokens that end an answer: the model's own, and the one by which the chat template closes a turn."""
    known = getattr(trained.model.generation_config, "eos_token_id", None)
    known = trained.processor.eos_token_id if known is None else known
    found = [*(known if isinstance(known, list) else [known]), end_of_turn(trained.processor)]
    return sorted({token for token in found if token is not None})


def room(trained: Trained, asked: int, wanted: int) -> int:
    """Return how many of the ``wanted`` tokens can be written before the model runs out of positions.

    Raises:
        ConfigError: if the prompt takes all positions.
    """
    positions = getattr(trained.model.config, "max_position_embeddings", None)
    if positions is None:
        return wanted
    if asked >= positions:
        raise ConfigError(f"the prompt has {asked:,} tokens, and {trained.base} takes {positions:,}: shorten it")
    return min(wanted, positions - asked)


class _Streamer(TextStreamer):
    """A streamer that calls a function with each piece of new text."""

    def __init__(self, tokenizer: Any, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._take(text)


@torch.inference_mode()
def _answers(
    trained: Trained, given: Sequence[Any], batch_size: int, inputs: Callable[[list[Any]], Any]
) -> Iterator[Answer]:
    for start in range(0, len(given), batch_size):
        batch = list(given[start : start + batch_size])
        logits = trained.model(**inputs(batch).to(trained.model.device)).logits.float().cpu()
        for number, (one, row) in enumerate(zip(batch, logits, strict=True), start):
            text, other = one if isinstance(one, tuple) else (one, None)
            name = text if isinstance(text, str) else text["path"] or f"image {number}"
            yield _answer(trained, name, row, other)


def _answer(trained: Trained, text: str, logits: Tensor, other: str | None) -> Answer:
    """Return the answer of the task's class, from the logits of one example."""
    if trained.task == "regression":
        return Estimate(text, float(logits[0]), other)
    if trained.task == "multi-label-classification":
        by_label = dict(zip(trained.labels, logits.sigmoid().tolist(), strict=True))
        return Labelled(text, [label for label in by_label if by_label[label] > THRESHOLD], by_label, other)
    by_label = dict(zip(trained.labels, logits.softmax(-1).tolist(), strict=True))
    return Prediction(text, max(by_label, key=lambda label: by_label[label]), by_label, other)


@torch.inference_mode()
def _tagged(trained: Trained, texts: Sequence[str], batch_size: int) -> Iterator[Tagged]:
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        split = [text.split() for text in batch]
        inputs = _tokens(trained, split, is_split_into_words=True)
        logits = trained.model(**inputs.to(trained.model.device)).logits.float().cpu()
        for number, (text, words) in enumerate(zip(batch, split, strict=True)):
            pieces = first_pieces(inputs.word_ids(number))
            kept = [place for place, word in enumerate(pieces) if word is not None]
            best = logits[number, kept].softmax(-1).max(-1)
            labels = [trained.labels[label] for label in best.indices.tolist()]
            yield Tagged(text, words[: len(kept)], labels, best.values.tolist())


def _tokens(trained: Trained, texts: Any, **arguments: Any) -> Any:
    given = map(list, zip(*texts, strict=True)) if isinstance(texts[0], tuple) else [texts]
    return trained.processor(
        *given, padding=True, truncation=True, max_length=trained.max_length, return_tensors="pt", **arguments
    )


def _pixels(trained: Trained, given: list[Any]) -> Any:
    files = [
        one if isinstance(one, str) else one["path"] if one["bytes"] is None else BytesIO(one["bytes"]) for one in given
    ]
    try:
        images = [Image.open(file).convert("RGB") for file in files]
    except OSError as error:
        raise ConfigError(f"no image that can be read: {error}") from None
    return trained.processor(images, return_tensors="pt")
