"""One training run, from settings to an adapter folder."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from randlora.errors import ConfigError
from randlora.train import tasks
from randlora.train.data import Data, load_data
from randlora.train.measure import StepTimer, peak_memory_bytes
from randlora.train.methods import prepare
from randlora.train.settings import TrainSettings
from randlora.tuner.atomic import write_atomically, write_json, write_text


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with; also the content of its ``metrics.json``.

    Attributes:
        method: randlora, lora, full or head.
        trainable_parameters: number of values that train, new heads included.
        steps: optimizer steps taken in all, those before a resume included.
        metrics: last training loss, and loss with accuracy or perplexity on the evaluation data.
        seconds_per_step: median over the steps of this process.
        peak_memory_bytes: most memory that this process has held, model and libraries included.
        result_path: folder of the adapter, the model or the head.
        result_bytes: bytes of its weights.
    """

    method: str
    trainable_parameters: int
    steps: int
    metrics: dict[str, float]
    seconds_per_step: float | None
    peak_memory_bytes: int
    result_path: str
    result_bytes: int


@dataclass(frozen=True)
class Resolved:
    """A run that is ready to start."""

    settings: TrainSettings
    data: Data
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module

    @property
    def trainable_parameters(self) -> int:
        """Number of values that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def resolve(settings: TrainSettings) -> Resolved:
    """Loads data and model and applies the method; trains nothing.

    Raises:
        ConfigError: naming what cannot be used.
    """
    data = load_data(settings)
    tokenizer = tasks.load_tokenizer(settings)
    set_seed(settings.seed)  # the head's initial weights
    model = tasks.load_model(settings, data.labels, tokenizer)
    return Resolved(settings, data, tokenizer, prepare(model, settings))


def train(settings: TrainSettings) -> TrainResult:
    """Trains, evaluates and saves.

    Writes into ``settings.output_dir``: ``adapter/`` (or ``model/``, ``head/``), ``resolved.yaml``, ``metrics.json``,
    ``history.json``, ``predictions.npz`` for classification, and the checkpoints.

    Raises:
        ConfigError: naming what cannot be used.
    """
    run = resolve(settings)
    output = Path(settings.output_dir)
    checkpoint = _checkpoint_to_resume(settings, output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "resolved.yaml", yaml.safe_dump(settings.model_dump(), sort_keys=False))

    timer = StepTimer()
    evaluation = tasks.tokenize(run.data.evaluation, run.tokenizer, settings)
    trainer = Trainer(
        model=run.model,
        args=_arguments(settings, output),
        train_dataset=tasks.tokenize(run.data.train, run.tokenizer, settings),
        eval_dataset=evaluation,
        data_collator=tasks.collator(run.tokenizer, settings),
        compute_metrics=tasks.metrics(settings),
        callbacks=[timer],
    )
    if settings.task == "sequence-classification":
        trainer.model_accepts_loss_kwargs = False  # its loss is a mean: accumulated ones are to be averaged, not summed
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if not math.isfinite(outcome.training_loss):
        raise FloatingPointError(
            f"the training loss is {outcome.training_loss}: lower learning_rate={settings.peak_learning_rate} or alpha"
        )
    prediction = trainer.predict(evaluation, metric_key_prefix="eval")
    metrics = tasks.with_perplexity(dict(prediction.metrics or {}), settings)
    if settings.task == "sequence-classification":
        _save_predictions(output / "predictions.npz", np.asarray(prediction.predictions), prediction.label_ids)

    folder = _save_result(run.model, settings, output)
    run.tokenizer.save_pretrained(folder)
    result = TrainResult(
        method=settings.method,
        trainable_parameters=run.trainable_parameters,
        steps=trainer.state.global_step,
        metrics={"train_loss": outcome.training_loss, **metrics},
        seconds_per_step=timer.median_seconds,
        peak_memory_bytes=peak_memory_bytes(),
        result_path=str(folder),
        result_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )
    write_json({"log": trainer.state.log_history}, output, "history.json")
    write_json(asdict(result), output, "metrics.json")
    return result


def _arguments(settings: TrainSettings, output: Path) -> TrainingArguments:
    return TrainingArguments(
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
        eval_strategy="no" if settings.eval_steps is None else "steps",
        eval_steps=settings.eval_steps,
        save_strategy="epoch" if settings.save_steps is None else "steps",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        report_to=[],
        dataloader_pin_memory=False,
    )


def _checkpoint_to_resume(settings: TrainSettings, output: Path) -> str | None:
    """The checkpoint to go on from.

    The Trainer writes ``trainer_state.json`` last, so that a checkpoint which has it is complete.
    """
    if settings.resume is None:
        return None
    if settings.resume != "auto":
        if not (Path(settings.resume) / "trainer_state.json").is_file():
            raise ConfigError(f"resume={settings.resume!r} is not the folder of a complete checkpoint")
        return settings.resume
    complete = [state.parent for state in (output / "checkpoints").glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]))) if complete else None


def _save_result(model: Any, settings: TrainSettings, output: Path) -> Path:
    if isinstance(model, PeftModel):
        folder = output / "adapter"
        model.save_pretrained(str(folder))
    elif settings.method == "full":
        folder = output / "model"
        model.save_pretrained(str(folder))
    else:
        folder = output / "head"
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        write_atomically(folder / "head.safetensors", lambda temporary: save_file(trained, temporary))
    return folder


def _save_predictions(path: Path, logits: np.ndarray, labels: Any) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, logits=logits, labels=labels)

    write_atomically(path, write)
