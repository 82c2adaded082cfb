"""Runs that leave nothing: a few steps, to find a learning rate or to take the time."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from randlora.train.callbacks import CheckpointOnInterrupt
from randlora.train.progress import CostInLines, CostOnBar
from randlora.train.run import Resolved, make_trainer, resolve
from randlora.train.settings import TrainSettings
from randlora.train.tasks import TASKS

SELECTION = 0.15  # of the training data: what rates are chosen by
MOST_SELECTED = 500  # examples of it


def shortened(settings: TrainSettings, steps: int) -> TrainSettings:
    """Return settings of so many steps, evaluated half-way and at the end on a part of the training data."""
    half = max(1, steps // 2)
    return settings.model_copy(
        update={
            "eval_data": None,
            "eval_fraction": SELECTION,
            "max_steps": 2 * half,
            "eval_steps": half,
            "save_steps": None,
            "best": None,
            "early_stopping": None,
            "resume": None,
            "report_to": ["none"],
        }
    )


@contextmanager
def short_run(settings: TrainSettings, callbacks: Sequence[TrainerCallback]) -> Iterator[tuple[Resolved, Trainer]]:
    """A run that is ready to take its steps, and its Trainer; both are gone afterwards."""
    with tempfile.TemporaryDirectory() as nothing:
        run = resolve(settings)
        held_out = run.data.evaluation.shuffle(seed=0)
        held_out = held_out.select(range(min(len(held_out), MOST_SELECTED)))
        trainer = make_trainer(
            run, Path(nothing), TASKS[settings.task].prepare(held_out, run.processor, settings), callbacks
        )
        trainer.args.save_strategy = SaveStrategy.NO
        for needless in (CostOnBar, CostInLines, CheckpointOnInterrupt):
            trainer.pop_callback(needless)
        yield run, trainer
        del run, trainer
    free_memory()


def free_memory() -> None:
    """Give back what models that are gone have held; they are in circles with their Trainers."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def whole_examples(trainer: Trainer) -> int:
    """Return the number of prepared examples that a run has which holds none out."""
    return round(len(trainer.train_dataset) / (1 - SELECTION))  # type: ignore[arg-type]
