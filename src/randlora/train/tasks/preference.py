"""Preferences: of two answers the better one (DPO, ORPO), or of one answer whether it is good (KTO).

A reward is β times the logarithm of how much more probable an answer has become than it is to the reference. TRL
trains; here are the data as its trainers take them, and the measure of a model on held-out data, for ``eval`` too.
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
"""Of tokens and their attention mask (rows, length): of each token but the first (rows, length − 1)."""


class Preference(Chat):
    """What the preference tasks share.

    Attributes:
        compares: whether the loss compares the model with a reference.
    """

    input_column = "prompt"
    metric_names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    loss_is_mean = True
    compares: ClassVar[bool] = True

    def identities(self, rows: Dataset) -> list[str]:
        """The prompts: no prompt that was trained on is held out with another answer."""
        return [json.dumps(prompt, sort_keys=True) for prompt in rows["prompt"]]

    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Tokens of prompt and answers, answers cut off at ``max_length``."""
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
        """Prepared examples as the trainer is to meet them, and weights among its arguments."""
        return prepared, {}

    def reduce(self, logits: Any, labels: Any) -> Any:
        """What ``measure`` gave."""
        return logits

    @abstractmethod
    def _prepared(self, row: dict[str, Any], processor: Any, length: int) -> dict[str, Any] | None:
        """One example; ``None`` where no token of an answer is left to predict."""

    @abstractmethod
    def measure(self, batch: dict[str, Tensor], model: LogProbs, reference: LogProbs, beta: float) -> Tensor:
        """What is kept of a batch for ``outcome``: (examples, numbers), rewards among them."""


class _Pairs(Preference):
    """Two answers to one prompt; ``measure`` gives both rewards and the loss."""

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Columns ``prompt``, ``chosen`` and ``rejected``."""
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
        """All chosen answers, then all rejected ones."""

        def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
            answers = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
            return _padded(answers, processor.pad_token_id)

        return collate

    def outcome(self, kept: np.ndarray, targets: np.ndarray, labels: list[str]) -> Outcome:
        """Mean loss; in how many pairs the chosen answer has the higher reward, and by how much on average."""
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
        """Each pair with its margin; its confidence is the probability that the margin gives to the choice."""
        texts = zip(*(processor.batch_decode(prepared[f"{name}_ids"][:]) for name in _PARTS), strict=True)
        for (prompt, better, worse), (chosen, rejected, loss, *_) in zip(texts, kept.tolist(), strict=True):
            text = f"{prompt}\nchosen: {better}\nrejected: {worse}"
            yield {"text": text, "confidence": _sigmoid(chosen - rejected), "loss": loss, "margin": chosen - rejected}


_PARTS = ("prompt", "chosen", "rejected")


class DirectPreference(_Pairs):
    """DPO."""

    name = "dpo"

    def measure(self, batch: dict[str, Tensor], model: LogProbs, reference: LogProbs, beta: float) -> Tensor:
        """(pairs, 3): the rewards of both answers, and the loss."""
        chosen, rejected = (beta * _gain(batch, model, reference)).chunk(2)
        return torch.stack([chosen, rejected, -logsigmoid(chosen - rejected)], dim=-1)


class OddsRatioPreference(_Pairs):
    """ORPO: likelihood of what was chosen, and the odds of the two answers; it has no reference.

    Rewards are β times the mean log-probability of an answer's tokens.
    """

    name = "orpo"
    compares = False

    def measure(self, batch: dict[str, Tensor], model: LogProbs, reference: LogProbs, beta: float) -> Tensor:
        """(pairs, 5): the rewards of both answers, the loss by the odds, summed loss and tokens of what was chosen."""
        found = model(batch["input_ids"], batch["attention_mask"])
        counted, there = batch["completion_mask"][:, 1:], batch["attention_mask"][:, 1:]
        chosen, rejected = ((found * counted).sum(-1) / counted.sum(-1)).chunk(2)
        odds = chosen - rejected - _log_of_rest(chosen) + _log_of_rest(rejected)
        likelihood, tokens = -(found * there).sum(-1).chunk(2)[0], there.sum(-1).chunk(2)[0]
        return torch.stack([beta * chosen, beta * rejected, -beta * logsigmoid(odds), likelihood, tokens], dim=-1)

    def collator(self, processor: Any) -> Callable[[Any], Any]:
        """The same answers under the names that TRL's ORPO reads, too."""
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
    """KTO: single answers, good or bad.

    Its loss sets a reward beside an estimate of the divergence from the reference, which is the mean reward of
    answers to other prompts: ``KL_completion_ids``. On held-out data the estimate is of all examples at once.
    """

    name = "kto"

    def read(self, rows: Dataset, settings: TrainSettings, source: str) -> Dataset:
        """Columns ``prompt``, ``completion`` and ``label``."""
        _refuse_columns(self.name, settings.input_column, None)
        return as_singles(rows, one_column("label_column", settings, "label"), source)

    def _prepared(self, row: dict[str, Any], processor: Any, length: int) -> dict[str, Any] | None:
        prompt, answer = prompt_and_answer(row["prompt"], row["completion"], processor)
        answer = answer[: max(length - len(prompt), 0)]
        if len(answer) < (1 if prompt else 2):
            return None
        return {"prompt_ids": prompt, "completion_ids": answer, "label": row["label"]}

    def prepare(self, rows: Dataset, processor: Any, settings: TrainSettings) -> Dataset:
        """Each with the answer of its neighbour."""
        found = super().prepare(rows, processor, settings)
        return _with_neighbours(found, len(found), settings.max_length)

    def training(self, prepared: Dataset, settings: TrainSettings) -> tuple[Dataset, dict[str, float]]:
        """In an order drawn once, since TRL takes them as they come; neighbours are of the same batch.

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
        if not 3 / 4 <= good / bad <= 4 / 3:  # what the paper of KTO advises
            warnings.warn(
                f"{good} answers are good and {bad} bad, and each of them counts the same; class_weights=balanced lets "
                "both kinds count the same",
                stacklevel=2,
            )
        return rows, {}

    def collator(self, processor: Any) -> Callable[[Any], Any]:
        """Answers, and answers of neighbours."""

        def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
            batch = {"label": torch.tensor([row["label"] for row in rows])}
            for prefix in ("", "KL_"):
                answers = [(row["prompt_ids"], row[f"{prefix}completion_ids"]) for row in rows]
                padded = _padded(answers, processor.pad_token_id)
                batch |= {f"{prefix}{key}": value for key, value in padded.items()}
            return batch

        return collate

    def measure(self, batch: dict[str, Tensor], model: LogProbs, reference: LogProbs, beta: float) -> Tensor:
        """(examples, 2): the reward, and that of the neighbour's answer."""
        gains = [_gain(batch, model, reference, prefix) for prefix in ("", "KL_")]
        return beta * torch.stack(gains, dim=-1)

    def outcome(self, kept: np.ndarray, targets: np.ndarray, labels: list[str]) -> Outcome:
        """Mean loss; in how many couples of a good and a bad answer the good one has the higher reward."""
        good = targets.astype(bool)
        reward = kept[:, 0].astype(np.float64)
        chosen, rejected = reward[good], reward[~good]
        metrics = {"loss": float(np.mean(1 - _rightness(kept, good)))}
        if len(chosen) and len(rejected):
            below = np.searchsorted(np.sort(rejected), chosen)  # strictly
            metrics["rewards/accuracies"] = float(below.mean() / len(rejected))
            metrics["rewards/margins"] = float(chosen.mean() - rejected.mean())
        metrics |= {
            f"rewards/{n}": float(v.mean()) for n, v in zip(_PARTS[1:], (chosen, rejected), strict=True) if len(v)
        }
        return Outcome(metrics)

    def records(
        self, rows: Dataset, prepared: Dataset, kept: np.ndarray, labels: list[str], processor: Any
    ) -> Iterable[dict[str, Any]]:
        """Each answer with its reward; its confidence is what the loss lacks to 1."""
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
    """Logarithms of the probabilities that a model gives to each token but the first, in float32 (rows, length − 1)."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    wanted = ids[:, 1:]
    # row by row: float32 logits of a whole batch would be the most memory that a run takes
    return torch.stack(
        [-cross_entropy(one.float(), row, reduction="none") for one, row in zip(logits, wanted, strict=True)]
    )


def _gain(batch: dict[str, Tensor], model: LogProbs, reference: LogProbs, prefix: str = "") -> Tensor:
    """By how much more probable each answer is to the model than to the reference, as a logarithm (rows)."""
    ids, attention = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    return ((model(ids, attention) - reference(ids, attention)) * batch[f"{prefix}completion_mask"][:, 1:]).sum(-1)


def _padded(answers: Sequence[tuple[list[int], list[int]]], padding: int) -> dict[str, Tensor]:
    """Prompts with their answers, all of one length."""
    length = max(len(prompt) + len(answer) for prompt, answer in answers)

    def filled(rows: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    return {
        "input_ids": filled(([*prompt, *answer] for prompt, answer in answers), padding),
        "attention_mask": filled(([1] * (len(prompt) + len(answer)) for prompt, answer in answers), 0),
        "completion_mask": filled(([0] * len(prompt) + [1] * len(answer) for prompt, answer in answers), 0),
    }


def _with_neighbours(rows: Dataset, together: int, length: int) -> Dataset:
    """Column ``KL_completion_ids``: the answer before in each group of so many, the last for the first of them."""
    answers = rows["completion_ids"][:]
    groups = [answers[start : start + together] for start in range(0, len(answers), together)]
    before = [answer for group in groups for answer in (group[-1], *group[:-1])]
    fitting = [answer[: length - len(prompt)] for answer, prompt in zip(before, rows["prompt_ids"], strict=True)]
    known = rows.remove_columns([name for name in rows.column_names if name.startswith("KL_")])
    return known.add_column("KL_completion_ids", fitting)


def _rightness(kept: np.ndarray, good: np.ndarray) -> np.ndarray:
    """How far each reward is on the right side of the estimated divergence: 0 to 1."""
    reward, neighbours = kept.astype(np.float64).T
    distance = reward - max(neighbours.mean(), 0.0)
    return _sigmoid(np.where(good, distance, -distance))


def _sigmoid(value: Any) -> Any:
    return np.exp(-np.logaddexp(0.0, -value))


def _log_of_rest(log_share: Tensor) -> Tensor:
    """log(1 − e^x): of all that an answer is not."""
    return torch.log(-torch.expm1(log_share))


def _refuse_columns(task: str, *given: str | list[str] | None) -> None:
    wrong = [name for name in given if name is not None]
    if wrong:
        raise ConfigError(f"task={task!r} reads columns by their own names, prompt, chosen, rejected …: rename {wrong}")
