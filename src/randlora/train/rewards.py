"""A Trainer that evaluates by rewards, which compare the model's probabilities with those of a reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings
from randlora.train.tasks.preference import Preference, log_probs
from randlora.train.trained import Trained
from randlora.tuner.base_model import load_base


class Rewards:
    """Mixin of Trainers that evaluates by rewards.

    Attributes:
        preference: the task.
        beta: β of the task.
        ref_model: the reference model; ``None`` where the reference is the model without its adapter.
    """

    preference: Preference
    beta: float
    ref_model: Any = None

    def prediction_step(
        self: Any, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """Return ``None`` for the loss, which ``outcome`` computes, then the result of ``measure``, and labels."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            kept = self.preference.measure(batch, partial(log_probs, model), partial(self._reference, model), self.beta)
            targets = batch["label"] if "label" in batch else torch.ones_like(kept[:, 0])
        return None, kept.float(), targets

    def _reference(self: Any, model: Any, ids: Tensor, attention: Tensor) -> Tensor:
        if self.ref_model is not None:
            return log_probs(self.ref_model, ids, attention)
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return log_probs(model, ids, attention)


def reward_trainer(task: Preference, trained: Trained, settings: TrainSettings) -> type[Trainer]:
    """Return a class of Trainers that evaluate a trained model by rewards, without TRL.

    Raises:
        ConfigError: if there is no reference model.
    """
    reference = _reference_of(task, trained) if task.compares else None

    class RewardTrainer(Rewards, Trainer):
        preference, beta, ref_model = task, settings.preference_beta or 0.0, reference

    return RewardTrainer


def _reference_of(task: Preference, trained: Trained) -> Any:
    """Return the reference of a trained model: its base model after full fine-tuning; ``None`` for an adapter."""
    if isinstance(trained.model, PeftModel):
        return None
    if trained.run is None or trained.run.method != "full":
        raise ConfigError(
            f"{trained.task} gives rewards beside a reference, the model without its adapter; a model alone has none, "
            f"and the base model is the reference itself. {trained.path} is loaded without an adapter: name a run, or "
            "an adapter, and leave out --base"
        )
    reference: Any = load_base(trained.run.model, task.model_type, dtype="float32")
    return reference.to(trained.model.device).eval()
