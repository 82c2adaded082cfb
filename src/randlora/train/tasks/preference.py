"""The preference tasks: the better of two answers (DPO, ORPO), or one answer that is good or bad (KTO).

A reward is β·log(p / p_ref): p is the probability that the model gives to an answer, p_ref that of the reference. TRL
trains. This file prepares the data for TRL's trainers, and measures a model on held-out data, for ``eval`` too.
"""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings
from randlora.train.tasks.base import Outcome, one_column
from randlora.train.tasks.chat import Chat, prompt_and_answer
from randlora.train.tasks.preference_shapes import as_pairs, as_singles

LogProbs: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function that takes tokens and their attention mask (rows, length), and returns the log-probability of each token
but the first (rows, length − 1)."""


class Preference(Chat):
    """Base class of the preference tasks.

    Attributes:
        compares: whether the loss compares the model with a reference.
    """

    input_column = "prompt"
    metric_names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    loss_is_mean = True
    compares: ClassVar[bool] = True

    def identities(self, rows: Dataset) -> list[str]:
        """Return the prompts, so that a split keeps all answers to one prompt on one side."""
        return [json.dumps(prompt, sort_keys=True) for prompt in rows["prompt"]]

    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Return the tokens of prompts and answers; answers are cut off at ``max_length``.

        Raises:
            ConfigError: if no example has an answer within ``max_length``.
        """
        found = [self._prepared(row, processor, settings.max_length) for row in rows]
        kept = [one for one in found if one is not None]
        limit = f"within max_length={settings.max_length} tokens"
        if not kept:
            raise ConfigError(f"none of the {len(found)} examples has an answer {limit}")
        if len(kept) < len(found):
            left_out = f"{len(found) - len(kept)} of {len(found)} examples"
            warnings.warn(f"{left_out} have no answer {limit} and are left out", stacklevel=2)
        return Dataset.from_list(kept)

    def training(self, prepared: Dataset, settings: TrainSettings) -> tuple[Dataset, dict[str, float]]:
        """Return the prepared examples in the order of training, and weights for the trainer's arguments."""
        return prepared, {}

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Return the numbers that ``measure`` returned, unchanged."""
        return logits

    @abstractmethod
    def _prepared(self, row: dict[str, Any], processor: Any, length: int) -> dict[str, Any] | None:
        """Return the tokens of one example; ``None`` where no token of an answer is left to predict."""

    @abstractmethod
    def measure(self, batch: dict[str, Tensor], model: LogProbs, reference: LogProbs, beta: float) -> Tensor:
        """Return the numbers of a batch that ``outcome`` needs, (examples, numbers), rewards among them."""


class _Pairs(Preference):
    """Tasks with two answers to one prompt; ``measure`` returns both rewards and the loss."""

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the columns ``prompt``, ``chosen`` and ``rejected``."""
        _refuse_columns(self.name, settings.input_column, settings.label_column)
        return as_pairs(rows, source)

    def _prepared(self, row: dict[str, Any], processor: Any, length: int) -> dict[str, Any] | None:
        both = [prompt_and_answer(row["prompt"], row[name], processor) for name in ("chosen", "rejected")]
        start = min(len(prompt) for prompt, _ in both)  # a token may join the end of the prompt to one answer only
        chosen, rejected = ([*prompt, *answer][start:length] for prompt, answer in both)
        if min(len(chosen), len(rejected)) < (1 if start else 2):
            return None
        return {"prompt_ids": both[0][0][:start], "chosen_ids": chosen, "rejected_ids": rejected}

    def collator(self, processor: Any) -> Callable[[Any], Any]:
        """Return a function that makes a batch: all chosen answers, then all rejected ones."""

        def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
            answers = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
            return _padded(answers, processor.pad_token_id)

        return collate

    def outcome(self, kept: np.ndarray, targets: np.ndarray, labels: list[str]) -> Outcome:
        """Return the mean loss, the share of pairs whose chosen answer has the higher reward, and the mean margin."""
        numbers = kept.astype(np.float64)
        chosen, rejected = numbers[:, 0], numbers[:, 1]
        right = int((chosen > rejected).sum())
        metrics = {
            "loss": self._loss(numbers),
            "rewards/accuracies": right / len(numbers),
            "rewards/margins": float((chosen - rejected).mean()),
            "rewards/chosen": float(chosen.mean()),
            "rewards/rejected": float(rejected.mean()),
        }
        return Outcome(metrics, correct=right)

    def _loss(self, numbers: np.ndarray) -> float:
        return float(numbers[:, 2].mean())

    def records(
        self, rows: Dataset, prepared: Dataset, kept: np.ndarray, labels: list[str], processor: Any
    ) -> Iterable[dict[str, Any]]:
        """Yield each pair with its margin; the confidence is the probability that the margin gives to the choice."""
        texts = zip(*(processor.batch_decode(prepared[f"{name}_ids"][:]) for name in _PARTS), strict=True)
        for (prompt, better, worse), (chosen, rejected, loss, *_) in zip(texts, kept.tolist(), strict=True):
            text = f"{prompt}\nchosen: {better}\nrejected: {worse}"
            yield {"text": text, "confidence": _sigmoid(chosen - rejected), "loss": loss, "margin": chosen - rejected}


_PARTS = ("prompt", "chosen", "rejected")


class DirectPreference(_Pairs):
    """DPO: a loss of the margin between the rewards of both answers."""

    name = "dpo"

    def measure(self, batch: dict[str, Tensor], model: LogProbs, reference: LogProbs, beta: float) -> Tensor:
        """Return (pairs, 3): the rewards of both answers, and the loss."""
        chosen, rejected = (beta * _gain(batch, model, reference)).chunk(2)
        return torch.stack([chosen, rejected, -logsigmoid(chosen - rejected)], dim=-1)


class OddsRatioPreference(_Pairs):
    """ORPO: a loss of the chosen answer's likelihood and the odds of both answers, without a reference.

    Rewards are β times the mean log-probability of an answer's tokens.
    """

    name = "orpo"
    compares = False

    def measure(self, batch: dict[str, Tensor], model: LogProbs, reference: LogProbs, beta: float) -> Tensor:
        """Return (pairs, 5): both rewards, the loss by the odds, and the chosen answer's summed loss and tokens."""
        found = model(batch["input_ids"], batch["attention_mask"])
        counted, there = batch["completion_mask"][:, 1:], batch["attention_mask"][:, 1:]
        chosen, rejected = ((found * counted).sum(-1) / counted.sum(-1)).chunk(2)
        odds = chosen - rejected - _log_of_rest(chosen) + _log_of_rest(rejected)
        likelihood, tokens = -(found * there).sum(-1).chunk(2)[0], there.sum(-1).chunk(2)[0]
        return torch.stack([beta * chosen, beta * rejected, -beta * logsigmoid(odds), likelihood, tokens], dim=-1)

    def collator(self, processor: Any) -> Callable[[Any], Any]:
        """Return a function that makes a batch of pairs, also under the names that TRL's ORPO reads."""
        both = super().collator(processor)

        def collate(rows: Any) -> dict[str, Tensor]:
            batch = both(rows)
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            named = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
            halves = {key: value.chunk(2) for key, value in named.items()}
            sides = {f"{side}_{key}": halves[key][place] for place, side in enumerate(_PARTS[1:]) for key in named}
            return {**batch, **sides}

        return collate

    def _loss(self, numbers: np.ndarray) -> float:
        return float(numbers[:, 2].mean() + numbers[:, 3].sum() / numbers[:, 4].sum())


class UnpairedPreference(Preference):
    """KTO: training on single answers, good or bad.

    The loss compares a reward with an estimate of the divergence from the reference. The estimate is the mean reward
    of answers to other prompts (``KL_completion_ids``); on held-out data, the mean over all examples.
    """

    name = "kto"

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Return the columns ``prompt``, ``completion`` and ``label``."""
        _refuse_columns(self.name, settings.input_column, None)
        return as_singles(rows, one_column("label_column", settings, "label"), source)

    def _prepared(self, row: dict[str, Any], processor: Any, length: int) -> dict[str, Any] | None:
        prompt, answer = prompt_and_answer(row["prompt"], row["completion"], processor)
        answer = answer[: max(length - len(prompt), 0)]
        if len(answer) < (1 if prompt else 2):
            return None
        return {"prompt_ids": prompt, "completion_ids": answer, "label": row["label"]}

    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Return the prepared examples, each with the answer of its neighbour."""
        found = super().prepare(rows, processor, settings)
        return _with_neighbours(found, len(found), settings.max_length)

    def training(self, prepared: Dataset, settings: TrainSettings) -> tuple[Dataset, dict[str, float]]:
        """Return the examples in random order, each with a neighbour of its batch, and the weights of both kinds.

        The order is drawn here, because TRL takes examples in the given order.

        Raises:
            ConfigError: if all answers are good, or all bad.
        """
        rows = _with_neighbours(prepared.shuffle(seed=settings.seed), settings.batch_size, settings.max_length)
        good = sum(rows["label"][:])
        bad = len(rows) - good
        if not good or not bad:
            kind = "good" if good else "bad"
            raise ConfigError(f"kto learns from good answers and from bad ones, and all {len(rows)} are {kind}")
        if settings.class_weights == "balanced":
            return rows, {"desirable_weight": len(rows) / (2 * good), "undesirable_weight": len(rows) / (2 * bad)}
        if not 3 / 4 <= good / bad <= 4 / 3:  # the range that KTO's paper advises
            warnings.warn(
                f"{good} answers are good and {bad} bad, and each of them counts the same; class_weights=balanced lets "
                "both kinds count the same",
                stacklevel=2,
            )
        return rows, {}

    def collator(self, processor: Any) -> Callable[[Any], Any]:
        """Return a function that makes a batch of answers, and of the answers of their neighbours."""

        def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
            batch = {"label": torch.tensor([row["label"] for row in rows])}
            for prefix in ("", "KL_"):
                answers = [(row["prompt_ids"], row[f"{prefix}completion_ids"]) for row in rows]
                padded = _padded(answers, processor.pad_token_id)
                batch |= {f"{prefix}{key}": value for key, value in padded.items()}
            return batch

        return collate

    def measure(self, batch: dict[str, Tensor], model: LogProbs, reference: LogProbs, beta: float) -> Tensor:
        """Return (examples, 2): the reward of the answer, and the reward of the neighbour's answer."""
        gains = [_gain(batch, model, reference, prefix) for prefix in ("", "KL_")]
        return beta * torch.stack(gains, dim=-1)

    def outcome(self, kept: np.ndarray, targets: np.ndarray, labels: list[str]) -> Outcome:
        """Return the mean loss, and the share of couples (good, bad) whose good answer has the higher reward."""
        good = targets.astype(bool)
        reward = kept[:, 0].astype(np.float64)
        chosen, rejected = reward[good], reward[~good]
        metrics = {"loss": float(np.mean(1 - _rightness(kept, good)))}
        if len(chosen) and len(rejected):
            below = np.searchsorted(np.sort(rejected), chosen)  # equal rewards count as wrong
            metrics["rewards/accuracies"] = float(below.mean() / len(rejected))
            metrics["rewards/margins"] = float(chosen.mean() - rejected.mean())
        metrics |= {
            f"rewards/{n}": float(v.mean()) for n, v in zip(_PARTS[1:], (chosen, rejected), strict=True) if len(v)
        }
        return Outcome(metrics)

    def records(
        self, rows: Dataset, prepared: Dataset, kept: np.ndarray, labels: list[str], processor: Any
    ) -> Iterable[dict[str, Any]]:
        """Yield each answer with its reward; the confidence is 1 − loss."""
        good = np.array(prepared["label"][:], dtype=bool)
        texts = zip(
            *(processor.batch_decode(prepared[name][:]) for name in ("prompt_ids", "completion_ids")), strict=True
        )
        for (prompt, answer), is_good, right, reward in zip(
            texts, good.tolist(), _rightness(kept, good).tolist(), kept[:, 0].tolist(), strict=True
        ):
            said = f"{prompt}\n{'good' if is_good else 'bad'}: {answer}"
            yield {"text": said, "confidence": right, "loss": 1 - right, "reward": reward}


def log_probs(model: Any, ids: Tensor, attention: Tensor) -> Tensor:
    """Return the log-probabilities that a model gives to each token but the first, in float32 (rows, length − 1)."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    wanted = ids[:, 1:]
    # row by row: float32 logits of a whole batch would be the most memory that a run takes
    return torch.stack(
        [-cross_entropy(one.float(), row, reduction="none") for one, row in zip(logits, wanted, strict=True)]
    )


def _gain(batch: dict[str, Tensor], model: LogProbs, reference: LogProbs, prefix: str = "") -> Tensor:
    """Return log(p / p_ref) of each answer, from the model and the reference (rows)."""
    ids, attention = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    return ((model(ids, attention) - reference(ids, attention)) * batch[f"{prefix}completion_mask"][:, 1:]).sum(-1)


def _padded(answers: Sequence[tuple[list[int], list[int]]], padding: int) -> dict[str, Tensor]:
    """Return prompts joined to their answers, padded to one length, with the masks of attention and of answers."""
    length = max(len(prompt) + len(answer) for prompt, answer in answers)

    def filled(rows: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    return {
        "input_ids": filled(([*prompt, *answer] for prompt, answer in answers), padding),
        "attention_mask": filled(([1] * (len(prompt) + len(answer)) for prompt, answer in answers), 0),
        "completion_mask": filled(([0] * len(prompt) + [1] * len(answer) for prompt, answer in answers), 0),
    }


def _with_neighbours(rows: Dataset, together: int, length: int) -> Dataset:
    """Add the column ``KL_completion_ids``, the previous answer in each group of ``together`` rows, in a circle."""
    answers = rows["completion_ids"][:]
    groups = [answers[start : start + together] for start in range(0, len(answers), together)]
    before = [answer for group in groups for answer in (group[-1], *group[:-1])]
    fitting = [answer[: length - len(prompt)] for answer, prompt in zip(before, rows["prompt_ids"], strict=True)]
    known = rows.remove_columns([name for name in rows.column_names if name.startswith("KL_")])
    return known.add_column("KL_completion_ids", fitting)


def _rightness(kept: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Return how far each reward is on the right side of the estimated divergence, from 0 to 1."""
    reward, neighbours = kept.astype(np.float64).T
    distance = reward - max(neighbours.mean(), 0.0)
    return _sigmoid(np.where(good, distance, -distance))


def _sigmoid(value: Any) -> Any:
    return np.exp(-np.logaddexp(0.0, -value))


def _log_of_rest(log_share: Tensor) -> Tensor:
    """Return log(1 − e^x), the log-probability of everything but an answer."""
    return torch.log(-torch.expm1(log_share))


def _refuse_columns(task: str, *given: str | list[str] | None) -> None:
    wrong = [name for name in given if name is not None]
    if wrong:
        raise ConfigError(f"task={task!r} reads columns by their own names, prompt, chosen, rejected …: rename {wrong}")
