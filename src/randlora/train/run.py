"""A training run, from settings to an adapter folder."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer_callback import ProgressCallback

from randlora.errors import ConfigError
from randlora.train import record
from randlora.train.arguments import early_stopping, training_arguments
from randlora.train.callbacks import CheckpointOnInterrupt, StopIfDiverged, warn_unless_learned
from randlora.train.data import Data, load_data, with_task_of_labels
from randlora.train.measure import StepTimer, peak_memory_bytes
from randlora.train.methods import prepare
from randlora.train.preference import preference_trainer, require_trl
from randlora.train.progress import CostInLines, CostOnBar
from randlora.train.resume import checkpoint_to_resume, is_finished
from randlora.train.settings import TrainSettings
from randlora.train.stream import Prepared, Stream
from randlora.train.tasks import TASKS, Preference, require_length
from randlora.train.trackers import close_trackers, trackers
from randlora.train.weighted_loss import balanced_decisions, balanced_loss
from randlora.tuner.files.adapter_folder import CONFIG
from randlora.tuner.files.atomic import disk_errors, write_atomically, write_json, write_text


@dataclass(frozen=True)
class TrainResult:
    """The result of a run, and the content of its ``metrics.json``.

    Attributes:
        method: randlora, lora, full or head.
        trainable_parameters: number of values that train, new heads included.
        steps: number of optimizer steps, those before a resume included.
        metrics: mean training loss of all steps, and loss with accuracy or perplexity on the evaluation data.
        seconds_per_step: median time of the steps of this process; ``None`` without a step.
        peak_memory_bytes: most memory of this process at one moment, model and libraries included.
        result_path: folder of the adapter, the model or the head.
        result_bytes: bytes of the weights in that folder.
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
    processor: Any
    model: nn.Module

    @property
    def trainable_parameters(self) -> int:
        """Number of values that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def resolve(settings: TrainSettings) -> Resolved:
    """Load data and model, and apply the method, without training.

    Raises:
        ConfigError: naming a setting, data or a model that cannot be used.
    """
    task = TASKS[settings.task]
    if isinstance(task, Preference):
        require_trl(settings.task)
    _require_no_run(settings.model)
    trackers(settings)
    if settings.best_metric not in (None, *task.metric_names):
        raise ConfigError(f"best={settings.best!r}: {settings.task} measures {', '.join(task.metric_names)}")
    data = load_data(settings)
    processor = task.load_processor(settings)
    set_seed(settings.seed)  # for the initial weights of the head
    model = task.load_model(settings, data.labels, processor)
    if getattr(model, "_hf_peft_config_loaded", False):  # an adapter on the hub
        _refuse_adapter(settings.model)
    if task.counts_tokens:
        require_length(model, settings)
    return Resolved(settings, data, processor, prepare(model, settings))


def train(settings: TrainSettings) -> TrainResult:
    """Train, evaluate and save; in several processes under ``accelerate launch`` or ``torchrun``.

    The run writes into ``settings.output_dir``: ``adapter/`` (or ``model/``, ``head/``), ``resolved.yaml``,
    ``metrics.json``, ``environment.json``, ``base_model/config.json``, ``history.jsonl``, ``predictions.jsonl``,
    ``predictions.npz`` for classification, and the checkpoints.

    Raises:
        ConfigError: naming a setting, data or a model that cannot be used.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint of the last step is written.
        OSError: if the disk is full, or cannot be written.
    """
    trackers(settings)  # raises for wrong names before the data is read
    settings = with_task_of_labels(settings)
    checkpoint = checkpoint_to_resume(settings)
    run = resolve(settings)
    output = _make_folder(settings.output_dir)
    with disk_errors(output):
        return _train(run, checkpoint, output)


def _train(run: Resolved, checkpoint: Path | None, output: Path) -> TrainResult:
    settings = run.settings
    if is_main_process():
        write_text(output / "resolved.yaml", yaml.safe_dump(settings.resolved(), sort_keys=False))
        record.write_environment(output)
        record.write_base_config(run.model, output)

    timer = StepTimer()
    history = record.HistoryFile(output, timer)
    prepared = TASKS[settings.task].prepare(run.data.evaluation, run.processor, settings)
    trainer = make_trainer(run, output, prepared, [timer, history])
    try:
        _take_steps(trainer, checkpoint)
        warn_unless_learned(trainer.state, settings.peak_learning_rate)
        folder = _save_result(trainer, run, output)  # before the evaluation, which may run out of memory
        metrics = _evaluate(trainer, prepared, run, output)
    finally:
        close_trackers(trainer)
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
    if is_main_process():
        history.write(trainer.state.log_history)
        write_json(asdict(result), output, "metrics.json")
    return result


def _require_no_run(model: str) -> None:
    """Raise for a run or an adapter as model, with what can be trained on instead."""
    folder = Path(model)
    if any((folder / inner / CONFIG).is_file() for inner in ("", "adapter")):
        _refuse_adapter(model)
    if (folder / "resolved.yaml").is_file() and (folder / "model").is_dir():
        raise ConfigError(f"model={model!r} is a run: train on its model, `--model {quote(str(folder / 'model'))}`")


def _refuse_adapter(model: str) -> None:
    """Raise for an adapter as model: Transformers would load the adapter too, but neither train nor save it."""
    raise ConfigError(
        f"model={model!r} is an adapter: merge it first, `randlora merge {quote(model)} merged`, and train on the "
        "result, `--model merged`, which is then the reference of preferences"
    )


def is_main_process() -> bool:
    """Return whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def make_trainer(
    run: Resolved, output: Path, evaluation: Dataset, callbacks: Sequence[TrainerCallback] = ()
) -> Trainer:
    """Return the Trainer of a run, which writes its checkpoints to ``output``.

    Args:
        run: as :func:`resolve` returned it.
        output: the run's folder.
        evaluation: prepared examples.
        callbacks: callbacks to call before the run's own.
    """
    settings, task = run.settings, TASKS[run.settings.task]

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        found = task.outcome(np.asarray(prediction.predictions), np.asarray(prediction.label_ids), run.data.labels)
        ours = isinstance(task, Preference)  # the Trainer computes the loss of other tasks
        return {name: value for name, value in found.metrics.items() if ours or name != "loss"}

    parts: dict[str, Any] = {
        "model": run.model,
        "train_dataset": _prepared(run),
        "eval_dataset": evaluation,
        "data_collator": task.collator(run.processor),
        "compute_metrics": metrics,
        "callbacks": [
            *callbacks,
            StopIfDiverged(settings.peak_learning_rate),
            CheckpointOnInterrupt(),
            *early_stopping(settings),
            trackers(settings),
        ],
    }
    if isinstance(task, Preference):
        trainer = preference_trainer(settings, task, output, {**parts, "processing_class": run.processor})
    else:
        trainer = Trainer(
            **parts,
            compute_loss_func=_weighted_loss(run),
            args=training_arguments(settings, output),
            preprocess_logits_for_metrics=task.reduce,
        )
    if task.loss_is_mean:
        trainer.model_accepts_loss_kwargs = False  # accumulated losses are to be averaged, not summed
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(CostOnBar if sys.stderr.isatty() else CostInLines)
    return trainer


def _prepared(run: Resolved) -> Dataset | Prepared:
    """Return the training data in the form of the model's inputs."""
    data = run.data.train
    if isinstance(data, Stream):
        return Prepared(data, run.processor)
    return TASKS[run.settings.task].prepare(data, run.processor, run.settings)


def _weighted_loss(run: Resolved) -> Callable[..., Tensor] | None:
    """Return the loss with equal weights of labels; ``None`` where the settings ask for no class weights."""
    data = run.data.train
    if run.settings.class_weights == "none" or isinstance(data, Stream):  # the settings refuse both together
        return None
    weigh = balanced_decisions if run.settings.task == "multi-label-classification" else balanced_loss
    return weigh(data["label"][:], len(run.data.labels))


def _make_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={path!r} cannot be made: {error.strerror}") from error
    return Path(path)


def _take_steps(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the last step; if a checkpoint is of the last step already, only load its weights."""
    if checkpoint is None or not is_finished(checkpoint):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if CheckpointOnInterrupt.happened(trainer):
            raise KeyboardInterrupt
        return
    # Trainer.train would take one step more than max_steps here.
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or str(checkpoint))


def _evaluate(trainer: Trainer, prepared: Dataset, run: Resolved, output: Path) -> dict[str, float]:
    """Return the metrics on the evaluation data; write the predictions, but no logits of a whole vocabulary."""
    task, labels = TASKS[run.settings.task], run.data.labels
    prediction = trainer.predict(prepared, metric_key_prefix="eval")
    kept, targets = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if is_main_process():
        if shortfall := task.outcome(kept, targets, labels).shortfall:
            warnings.warn(shortfall, stacklevel=2)
        if task.classifies and kept.ndim == 2:
            _save_predictions(output / "predictions.npz", kept, targets)
        rows = task.records(run.data.evaluation, prepared, kept, labels, run.processor)
        record.write_predictions(output, rows)
    return dict(prediction.metrics or {})


def _mean_loss(state: TrainerState) -> float:
    """Return the mean loss of all steps, including those before a resume, which the Trainer's mean leaves out."""
    return fmean(entry["loss"] for entry in state.log_history if "loss" in entry)


def _save_result(trainer: Trainer, run: Resolved, output: Path) -> Path:
    """Save the trained weights, gathered from all processes and written by one; return their folder."""
    model: Any = run.model
    kind = "adapter" if isinstance(model, PeftModel) else "model" if run.settings.method == "full" else "head"
    folder = output / kind
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_main_process():
        if kind == "head":
            folder.mkdir(parents=True, exist_ok=True)
            names = {name for name, p in model.named_parameters() if p.requires_grad}
            trained = {name: weights[name].detach().contiguous() for name in sorted(names)}
            write_atomically(folder / record.HEAD, lambda temporary: save_file(trained, temporary))
        else:
            model.save_pretrained(str(folder), state_dict=weights)
        run.processor.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def _save_predictions(path: Path, logits: np.ndarray, labels: Any) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, logits=logits, labels=labels)

    write_atomically(path, write)
