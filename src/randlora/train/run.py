"""One training run, from settings to an adapter folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback

from randlora.errors import ConfigError
from randlora.train import record, tasks
from randlora.train.callbacks import LossOnBar, StopIfDiverged
from randlora.train.data import Data, load_data
from randlora.train.measure import StepTimer, peak_memory_bytes
from randlora.train.methods import prepare
from randlora.train.resume import checkpoint_to_resume, is_finished
from randlora.train.settings import TrainSettings
from randlora.tuner.atomic import write_atomically, write_json, write_text


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with; also the content of its ``metrics.json``.

    Attributes:
        method: randlora, lora, full or head.
        trainable_parameters: number of values that train, new heads included.
        steps: optimizer steps taken in all, those before a resume included.
        metrics: mean training loss of all steps, and loss with accuracy or perplexity on the evaluation data.
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
    tasks.require_length(model, settings)
    return Resolved(settings, data, tokenizer, prepare(model, settings))


def train(settings: TrainSettings) -> TrainResult:
    """Trains, evaluates and saves.

    Writes into ``settings.output_dir``: ``adapter/`` (or ``model/``, ``head/``), ``resolved.yaml``, ``metrics.json``,
    ``environment.json``, ``base_model/config.json``, ``history.jsonl``, ``predictions.jsonl``,
    ``predictions.npz`` for classification, and the checkpoints.

    Raises:
        ConfigError: naming what cannot be used.
    """
    checkpoint = checkpoint_to_resume(settings)
    run = resolve(settings)
    output = _make_folder(settings.output_dir)
    write_text(output / "resolved.yaml", yaml.safe_dump(settings.model_dump(), sort_keys=False))

    record.write_environment(output)
    record.write_base_config(run.model, output)

    timer = StepTimer()
    history = record.HistoryFile(output, timer)
    evaluation = tasks.tokenize(run.data.evaluation, run.tokenizer, settings)
    trainer = Trainer(
        model=run.model,
        args=_arguments(settings, output),
        train_dataset=tasks.tokenize(run.data.train, run.tokenizer, settings),
        eval_dataset=evaluation,
        data_collator=tasks.collator(run.tokenizer, settings),
        compute_metrics=tasks.metrics(settings),
        preprocess_logits_for_metrics=tasks.reduce_logits(settings),
        callbacks=[timer, history, StopIfDiverged(settings.peak_learning_rate)],
    )
    if settings.task == "sequence-classification":
        trainer.model_accepts_loss_kwargs = False  # its loss is a mean: accumulated ones are to be averaged, not summed
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LossOnBar)
    _take_steps(trainer, checkpoint)
    folder = _save_result(run.model, settings, output)  # before the evaluation, which may fail for want of memory
    run.tokenizer.save_pretrained(folder)
    history.write(trainer.state.log_history)
    metrics = _evaluate(trainer, evaluation, run, output)
    result = TrainResult(
        method=settings.method,
        trainable_parameters=run.trainable_parameters,
        steps=trainer.state.global_step,
        metrics={"train_loss": _mean_loss(trainer.state), **metrics},
        seconds_per_step=timer.median_seconds,
        peak_memory_bytes=peak_memory_bytes(),
        result_path=str(folder),
        result_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )
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


def _make_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={path!r} cannot be made: {error.strerror}") from error
    return Path(path)


def _take_steps(trainer: Trainer, checkpoint: Path | None) -> None:
    """Trains to the end; a run that was cut off between its last step and its result only needs its weights back."""
    if checkpoint is None or not is_finished(checkpoint):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    # Trainer.train would take one step more than max_steps here.
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _evaluate(trainer: Trainer, data: Dataset, run: Resolved, output: Path) -> dict[str, float]:
    """Metrics on the evaluation data; what was predicted there is kept, but no logits of a whole vocabulary."""
    prediction = trainer.predict(data, metric_key_prefix="eval")
    found, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if run.settings.task == "causal-lm":
        texts = run.tokenizer.batch_decode(data["input_ids"][:])
        record.write_read(output, texts, found)
    else:
        _save_predictions(output / "predictions.npz", found, labels)
        record.write_classified(output, run.data.evaluation["text"][:], found, labels, run.data.labels)
    return tasks.with_perplexity(dict(prediction.metrics or {}), run.settings)


def _mean_loss(state: TrainerState) -> float:
    """Over all steps, those before a resume included, which the Trainer's own mean leaves out."""
    return fmean(entry["loss"] for entry in state.log_history if "loss" in entry)


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
