"""TRL's trainers of preferences as a run has them: with its tokens, its measure, and no second base model."""

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

_COPY = "ref"  # TRL's name of the adapter that it compares a trained one with


def require_trl(task: str) -> None:
    """Refuses to start without TRL.

    Raises:
        ConfigError: saying how to install it.
    """
    if importlib.util.find_spec("trl") is None:
        raise ConfigError(f"task={task!r} trains by TRL, which is not installed: pip install 'randlora[preferences]'")


def preference_trainer(settings: TrainSettings, task: Preference, output: Path, parts: dict[str, Any]) -> Trainer:
    """Return TRL's trainer for a task.

    Args:
        settings: of the run.
        task: its task.
        output: the run's folder.
        parts: what every Trainer is given, the model and prepared examples among them.

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
                per_device_eval_batch_size=settings.batch_size,  # of a pair, two answers
                remove_unused_columns=False,  # the model takes none: they are put together by the collator
                **weights,
            ),
        )
    except ValueError as error:
        raise ConfigError(f"task={task.name!r}: {error}") from error
    trainer.preference = task
    if adapted and _COPY in model.peft_config:  # of an adapter that has learned nothing: the base model is the same
        model.delete_adapter(_COPY)
    for name, values in trained.items():  # TRL rounds them to bfloat16 where the base model is in codes
        model.get_parameter(name).data = values
    return trainer


def _classes(task: str) -> tuple[Any, type[TrainingArguments]]:
    """TRL's trainer, with what a run changes in it, and its arguments."""
    base: Any
    arguments: Any
    if task == "orpo":
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL's own way to say that one knows
        from trl.experimental.orpo import ORPOConfig as arguments  # noqa: PLC0415
        from trl.experimental.orpo import ORPOTrainer as base  # noqa: PLC0415
    elif task == "kto":
        from trl import KTOConfig as arguments  # noqa: PLC0415
        from trl import KTOTrainer as base  # noqa: PLC0415
    else:
        from trl import DPOConfig as arguments  # noqa: PLC0415
        from trl import DPOTrainer as base  # noqa: PLC0415

    class OfARun(Rewards, base):
        """Takes tokens as they are, sends nothing, and leaves the card to ``push``."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
            """ORPO's."""
            return {}

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """None in the folder of checkpoints."""

        def _send_telemetry(self) -> None:
            pass

    return OfARun, arguments
