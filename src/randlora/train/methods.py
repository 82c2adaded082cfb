"""The methods of fine-tuning, applied to a model."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig, TaskType, VeraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from randlora.errors import ConfigError
from randlora.ops.bases import basis_fields
from randlora.train.settings import TrainSettings
from randlora.train.tasks import TASKS
from randlora.tuner.config import RandLoraConfig

_HEADS = ("classifier", "score")  # Transformers' names of a new classification head, which PEFT trains in full


def prepare(model: PreTrainedModel, settings: TrainSettings) -> nn.Module:
    """Return ``model`` ready to train by ``settings.method``; a new classification head trains in every method.

    Raises:
        ConfigError: if the method cannot be applied to the model or the task.
    """
    _require_modules(model, settings.modules_to_save)
    if settings.method == "full":
        return model
    if settings.method == "head":
        return _only_head(model, settings)
    if settings.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)
    try:
        return get_peft_model(model, _config(model, settings))
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name in _linear_names(model, list(_HEADS))})
        raise ConfigError(
            f"method={settings.method!r} with target_modules={settings.target_modules!r}: "
            f"{str(error).partition('. ')[0]}. Linear layers of {type(model).__name__} are named {', '.join(linear)}"
        ) from error


def _config(model: PreTrainedModel, settings: TrainSettings) -> PeftConfig:
    task = TASKS[settings.task]
    targets, heads = settings.targets, []
    if task.classifies and task.peft_type is not TaskType.SEQ_CLS:  # PEFT finds heads of this type itself
        heads = [name for name in _HEADS if hasattr(model, name)]
        targets = _linear_names(model, heads) if targets == "all-linear" else targets
    common: dict[str, Any] = {
        "r": settings.r,
        "target_modules": targets,
        "modules_to_save": [*settings.modules_to_save, *heads] or None,
        "task_type": task.peft_type,
    }
    if settings.method == "lora":
        return LoraConfig(
            lora_alpha=settings.scaling_alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            **common,
        )
    if settings.method == "vera":
        return VeraConfig(vera_dropout=settings.dropout, save_projection=settings.save_projection, **common)
    return RandLoraConfig(
        randlora_alpha=settings.scaling_alpha,  # type: ignore[arg-type]
        randlora_scaling=settings.scaling,
        randlora_dropout=settings.dropout,
        save_projection=settings.save_projection,
        **basis_fields(vars(settings)),
        **common,
    )


def _linear_names(model: PreTrainedModel, heads: list[str]) -> list[str]:
    """Return the names of all linear layers but the heads."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.partition(".")[0] not in heads
    ]


def _only_head(model: PreTrainedModel, settings: TrainSettings) -> nn.Module:
    head = next((getattr(model, name) for name in _HEADS if hasattr(model, name)), None)
    if not TASKS[settings.task].classifies or head is None:
        raise ConfigError(
            f"method='head' trains a new classification head, which {type(model).__name__} does not have; choose "
            "randlora, lora or full"
        )
    model.requires_grad_(False)
    head.requires_grad_(True)
    for name, module in model.named_modules():
        if any(_is_named(name, wanted) for wanted in settings.modules_to_save):
            module.requires_grad_(True)
    return model


def _require_modules(model: nn.Module, wanted: list[str]) -> None:
    """Raise for names of ``modules_to_save`` that the model does not have: PEFT ignores these."""
    names = [name for name, _ in model.named_modules()]
    unknown = [one for one in wanted if not any(_is_named(name, one) for name in names)]
    if unknown:
        raise ConfigError(f"modules_to_save={unknown}: {type(model).__name__} has no modules of these names")


def _is_named(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
