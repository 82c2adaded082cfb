"""A run's settings as arguments of the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from randlora.train.settings import TrainSettings
from randlora.train.tasks import TASKS


def training_arguments(
    settings: TrainSettings, output: Path, kind: type[TrainingArguments] = TrainingArguments, **changes: Any
) -> TrainingArguments:
    """Return the Trainer's arguments for a run that writes to ``output``, of class ``kind`` and with ``changes``."""
    values: dict[str, Any] = dict(
        output_dir=str(output / "checkpoints"),
        learning_rate=settings.peak_learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_fraction,
        weight_decay=settings.weight_decay,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_total_limit=2,
        report_to=[],  # the trackers are among the callbacks
        run_name=output.name,  # for trackers, which would choose a random name
        disable_tqdm=False,  # by default it follows the verbosity of Transformers
        dataloader_pin_memory=False,
        remove_unused_columns=TASKS[settings.task].counts_tokens,  # images are opened from columns that no model takes
        include_num_input_tokens_seen="non_padding" if TASKS[settings.task].counts_tokens else "no",
        **_when(settings),
    )
    return kind(**{**values, **changes})


def early_stopping(settings: TrainSettings) -> list[TrainerCallback]:
    """Return the callback for early stopping in a list; an empty list where the settings ask for none."""
    return [] if settings.early_stopping is None else [EarlyStoppingCallback(settings.early_stopping)]


def _when(settings: TrainSettings) -> dict[str, Any]:
    """Return the arguments for evaluations and checkpoints; to keep the best one, both must be at the same steps."""
    best = settings.best_metric
    evaluate = "steps" if settings.eval_steps else "epoch" if best else "no"
    save = "steps" if settings.save_steps or settings.streaming or (best and settings.eval_steps) else "epoch"
    tenth = max(1, (settings.max_steps or 0) // 10)  # for a run on a stream, which has no epochs
    found = {
        "eval_strategy": evaluate,
        "eval_steps": settings.eval_steps,
        "save_strategy": save,
        "save_steps": settings.save_steps or settings.eval_steps or tenth,
    }
    if best:
        found |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": best,
            "greater_is_better": best not in ("loss", "perplexity", "rmse"),
        }
    return found
