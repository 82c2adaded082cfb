"""Short runs that keep no files, to find a learning rate or to measure time."""

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

SELECTION = 0.15  # part of the training data by which rates are chosen
MOST_SELECTED = 500  # examples of that part


def shortened(settings: TrainSettings, steps: int) -> TrainSettings:
    """Return settings of a run of ``steps``, evaluated half-way and at the end on a part of the training data."""
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
    """Yield a run that is ready to take its steps, and its Trainer; free the memory of both afterwards."""
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
    """Free the memory of models without an owner: reference cycles with their Trainers keep them alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def whole_examples(trainer: Trainer) -> int:
    """Return the number of prepared examples of a run without held-out data, estimated from a short run."""
    return round(len(trainer.train_dataset) / (1 - SELECTION))  # type: ignore[arg-type]
