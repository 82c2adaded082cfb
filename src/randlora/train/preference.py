"""TRL's trainers of preferences, changed for a run: its own tokens, its own measure, no second base model."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainingArguments

from randlora.errors import ConfigError
from randlora.train.arguments import training_arguments
from randlora.train.rewards import Rewards
from randlora.train.settings import TrainSettings
from randlora.train.tasks.preference import Preference

_COPY = "ref"  # TRL's name of the adapter that serves as reference


def require_trl(task: str) -> None:
    """Raise if TRL is not installed.

    Raises:
        ConfigError: saying how to install it.
    """
    if importlib.util.find_spec("trl") is None:
        raise ConfigError(f"task={task!r} trains by TRL, which is not installed: pip install 'randlora[preferences]'")


def preference_trainer(settings: TrainSettings, task: Preference, output: Path, parts: dict[str, Any]) -> Trainer:
    """Return TRL's trainer for a task.

    Args:
        settings: settings of the run.
        task: task of the run.
        output: the run's folder.
        parts: arguments of every Trainer, the model and prepared examples among them.

    Raises:
        ConfigError: if TRL refuses the model.
    """
    kind, arguments = _classes(task.name)
    model = parts["model"]
    adapted = isinstance(model, PeftModel)
    trained = {name: p.data.clone() for name, p in model.named_parameters() if adapted and p.requires_grad}
    if task.compares and not adapted:
        parts = {**parts, "ref_model": copy.deepcopy(model)}
    rows, weights = task.training(parts["train_dataset"], settings)
    try:
        trainer = kind(
            **{**parts, "train_dataset": rows},
            args=training_arguments(
                settings,
                output,
                arguments,
                beta=settings.preference_beta,
                max_length=settings.max_length,
                per_device_eval_batch_size=settings.batch_size,  # not twice as many: a pair has two answers
                remove_unused_columns=False,  # the collator makes the model's inputs of them
                **weights,
            ),
        )
    except ValueError as error:
        raise ConfigError(f"task={task.name!r}: {error}") from error
    trainer.preference = task
    if adapted and _COPY in model.peft_config:  # an untrained copy equals the base model
        model.delete_adapter(_COPY)
    for name, values in trained.items():  # TRL rounds adapters to bfloat16 if the base model is quantised
        model.get_parameter(name).data = values
    return trainer


def _classes(task: str) -> tuple[Any, type[TrainingArguments]]:
    """Return TRL's trainer, changed for a run, and the class of its arguments."""
    base: Any
    arguments: Any
    if task == "orpo":
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL's switch for its warning
        from trl.experimental.orpo import ORPOConfig as arguments  # noqa: PLC0415
        from trl.experimental.orpo import ORPOTrainer as base  # noqa: PLC0415
    elif task == "kto":
        from trl import KTOConfig as arguments  # noqa: PLC0415
        from trl import KTOTrainer as base  # noqa: PLC0415
    else:
        from trl import DPOConfig as arguments  # noqa: PLC0415
        from trl import DPOTrainer as base  # noqa: PLC0415

    class OfARun(Rewards, base):
        """TRL's trainer that takes prepared tokens, sends no telemetry and writes no model card."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
            """Return nothing: ORPO's trainer would make tokens here, and the examples have them."""
            return {}

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """Write no card into the folder of checkpoints: ``push`` makes one."""

        def _send_telemetry(self) -> None:
            pass

    return OfARun, arguments
