"""A run's settings as the Trainer takes them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_reporting_integration_callbacks

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings
from randlora.train.tasks import TASKS


def training_arguments(
    settings: TrainSettings, output: Path, kind: type[TrainingArguments] = TrainingArguments, **changes: Any
) -> TrainingArguments:
    """Arguments of the Trainer for a run that writes to ``output``; of another ``kind``, with ``changes``."""
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
        disable_tqdm=False,  # which would follow the verbosity of Transformers
        dataloader_pin_memory=False,
        remove_unused_columns=TASKS[settings.task].counts_tokens,  # images are opened from columns that no model takes
        include_num_input_tokens_seen="non_padding" if TASKS[settings.task].counts_tokens else "no",
        **_when(settings),
    )
    return kind(**{**values, **changes})


def trackers(settings: TrainSettings) -> list[TrainerCallback]:
    """What the run reports to, besides its own files.

    Raises:
        ConfigError: naming a tracker that Transformers does not know, or that is not installed.
    """
    names = settings.report_to
    if names is None:
        names = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    names = [name for name in names if name != "none"]
    unknown = sorted(set(names) - set(INTEGRATION_TO_CALLBACK))
    if unknown:
        raise ConfigError(f"report_to={unknown}: known are none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
    try:
        return [tracker() for tracker in get_reporting_integration_callbacks(names)]
    except (RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to={names}: {error}") from None


def early_stopping(settings: TrainSettings) -> list[TrainerCallback]:
    """Ends the run when it no longer gets better, if it is to."""
    return [] if settings.early_stopping is None else [EarlyStoppingCallback(settings.early_stopping)]


def _when(settings: TrainSettings) -> dict[str, Any]:
    """When to evaluate and to write checkpoints; the best one is only known where both are done."""
    best = settings.best_metric
    evaluate = "steps" if settings.eval_steps else "epoch" if best else "no"
    save = "steps" if settings.save_steps or (best and settings.eval_steps) else "epoch"
    found = {
        "eval_strategy": evaluate,
        "eval_steps": settings.eval_steps,
        "save_strategy": save,
        "save_steps": settings.save_steps or settings.eval_steps or 500,
    }
    if best:
        found |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": best,
            "greater_is_better": best not in ("loss", "perplexity"),
        }
    return found
