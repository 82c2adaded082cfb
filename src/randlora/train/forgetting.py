"""A measure of the ability that a tuned model has lost, on data of another kind than its training data."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional

from randlora.errors import ConfigError
from randlora.train.data import load_rows
from randlora.train.infer import predict
from randlora.train.settings import TrainSettings
from randlora.train.tasks import TASKS, Preference
from randlora.train.tasks.texts import Texts
from randlora.train.trained import Trained, load_trained

NEAREST = 10
_MOST = 1000  # rows of the other data


class Forgetting:
    """The forgetting of runs, measured on the same rows for all.

    The forgetting of a language model is its loss per token on the rows minus that of the model before training; after
    preferences, the rows are plain text. The forgetting of an encoder is the share of each text's ten nearest texts
    that are no longer among its ten nearest, by the mean of the last hidden states.

    Args:
        settings: settings of the runs.
        other_data: file, folder or name of the rows.

    Raises:
        ConfigError: if the data cannot be read, or the task has no texts.
    """

    def __init__(self, settings: TrainSettings, other_data: str) -> None:
        self._language = TASKS[settings.task].model_type == "CAUSAL_LM"
        if not self._language and not isinstance(TASKS[settings.task], Texts):
            raise ConfigError(f"other_data={other_data!r}: forgetting is measured on texts, not for {settings.task}")
        plain = not self._language or isinstance(TASKS[settings.task], Preference)  # labels and pairs are not needed
        reader = _reader_of_texts(settings) if plain else settings
        rows = load_rows(other_data, reader).shuffle(seed=0)
        self._rows: Dataset = rows.select(range(min(len(rows), _MOST)))
        self._settings, self._reader = settings, reader
        if not self._language and len(self._rows) <= NEAREST:
            raise ConfigError(f"other_data={other_data!r} has {len(self._rows)} rows; {NEAREST + 1} are needed")

    @property
    def unit(self) -> str:
        """Unit of the numbers, in words."""
        return "loss per token gained" if self._language else "neighbours lost"

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, run: Path) -> float:
        """Return the forgetting of the run in this folder, in ``unit``."""
        after = self._ability(load_trained(run))
        if self._language:
            return float(after - self._before)
        kept = [len(set(a) & set(b)) / NEAREST for a, b in zip(self._before.tolist(), after.tolist(), strict=True)]
        return 1 - fmean(kept)

    @cached_property
    def _before(self) -> Any:
        task = None if self._language else self._settings.task
        return self._ability(load_trained(self._settings.model, task=task))

    def _ability(self, trained: Trained) -> Any:
        return self._loss(trained) if self._language else self._neighbours(trained)

    def _loss(self, trained: Trained) -> float:
        task = TASKS[self._reader.task]
        examples = task.prepare(self._rows, trained.processor, self._reader)
        found = predict(trained.model, examples, task, trained.processor, self._settings.batch_size)
        return task.outcome(np.asarray(found.predictions), np.asarray(found.label_ids), []).metrics["loss"]

    @torch.no_grad()
    def _neighbours(self, trained: Trained) -> Tensor:
        """Return the nearest texts of each text (texts, NEAREST), by the cosine of their vectors."""
        vectors, size = [], self._settings.batch_size
        texts = list(self._rows["text"])
        for start in range(0, len(texts), size):
            batch = trained.processor(
                texts[start : start + size],
                padding=True,
                truncation=True,
                max_length=self._settings.max_length,
                return_tensors="pt",
            ).to(trained.model.device)
            states = trained.model(**batch, output_hidden_states=True).hidden_states[-1].float()
            mask = batch["attention_mask"][..., None]
            vectors.append(functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        unit = torch.cat(vectors)
        return (unit @ unit.T).fill_diagonal_(-1).topk(NEAREST).indices


def _reader_of_texts(settings: TrainSettings) -> TrainSettings:
    """Return settings that read only the texts, without labels; of a pair, only the first text."""
    column = settings.input_column
    first = column[0] if isinstance(column, list) else column
    return settings.model_copy(update={"task": "causal-lm", "input_column": first})
