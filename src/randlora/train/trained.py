"""Loading of trained models: the model with its adapter, its tokenizer, its task and its labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from peft import PeftConfig
from safetensors.torch import load_file

from randlora.errors import CheckpointError, ConfigError
from randlora.train.data import Source, load_data
from randlora.train.record import HEAD
from randlora.train.settings import TaskName, TrainSettings, load_settings
from randlora.train.tasks import TASKS, Task
from randlora.train.tasks.quantized import weights_as
from randlora.tuner.base_model import base_path_of, load_base, model_config, with_adapter
from randlora.tuner.files.adapter_folder import CONFIG, head_size, label_names, problem_type, read_config, unfinished

Columns: TypeAlias = str | list[str] | None
"""A column of the data, or several; ``None`` for the default."""
_LENGTH = 256  # longest input of a model without a run


@dataclass(frozen=True)
class Trained:
    """A trained model, in evaluation mode.

    Attributes:
        path: folder of the adapter, or of the whole model.
        base: name of the base model; name of the model itself where there is no adapter.
        model: the model, on the accelerator if there is one.
        processor: tokenizer with a padding token; for images, the image processor.
        task: name of the task.
        labels: names of a classifier's labels.
        max_length: longest input in tokens.
        run: settings of the run that trained the model, if the folder belongs to a run.
    """

    path: Path
    base: str
    model: Any
    processor: Any
    task: TaskName
    labels: tuple[str, ...]
    max_length: int
    run: TrainSettings | None

    @property
    def reads_pairs(self) -> bool:
        """Whether the model was trained on pairs of texts."""
        return self.run is not None and isinstance(self.run.input_column, list)

    def settings_for(
        self,
        data: Source,
        input_column: Columns = None,
        label_column: Columns = None,
        encoding: str | None = None,
    ) -> TrainSettings:
        """Return settings to read data for this model: those of its run, without those of the run's own data."""
        named = list(data) if not isinstance(data, str) else data
        known = TrainSettings(model=self.base, data=named) if self.run is None else self.run
        changes: dict[str, Any] = {"encoding": encoding, **dict.fromkeys(("data_config", "split", "eval_split"))}
        columns = {"input_column": input_column, "label_column": label_column}
        changes |= {name: column for name, column in columns.items() if column is not None}
        length = max(self.max_length, 2)
        changes |= {"data": named, "task": self.task, "max_length": length, "streaming": False}
        return known.model_copy(update=changes)


def load_trained(
    path: str | os.PathLike[str],
    base_model_path: str | os.PathLike[str] | None = None,
    task: TaskName | None = None,
    adapter: bool = True,
) -> Trained:
    """Load a run of any method, an adapter of any of PEFT's methods, or a whole model.

    Args:
        path: folder of the run, adapter or model.
        base_model_path: folder or name of an adapter's base model, if not the one in its config.
        task: name of the task, by default that of the run, the adapter's config or the class of the model.
        adapter: whether to load the adapter, or the head of a run that trained only a head; if false, the result is
            the base model.

    Raises:
        CheckpointError: if there is nothing to load, or the adapter cannot be read.
        ConfigError: if the base model or tokenizer is not at hand, or the task is not known.
    """
    place = locate(path)
    folder, _, run, config = place
    head = folder / HEAD if (folder / HEAD).is_file() else None
    if head is not None and run is not None:
        base = os.fspath(base_model_path or run.model)
    else:
        base = os.fspath(folder) if config is None else base_path_of(config, base_model_path)
    task = task or task_of(place, base)
    labels = _labels(folder, run, base) if TASKS[task].classifies else ()
    model = _load_base(base, TASKS[task], run, **(TASKS[task].head(labels) if labels else {}))
    if config is not None and adapter:
        model = with_adapter(model, folder)
    if head is not None and adapter:
        model.load_state_dict(load_file(head), strict=False)
    processor = load_processor((os.fspath(folder), base), TASKS[task])
    return _ready(folder, base, model, processor, task, labels, run)


def load_language_model(base: str, run: TrainSettings | None, tokenizer_beside: str) -> Trained:
    """Load the base model of adapters, without an adapter.

    Args:
        base: a folder, or a name on the hub.
        run: settings of a run on this model, for the codes of its weights.
        tokenizer_beside: folder of the tokenizer, if the base model has none.

    Raises:
        ConfigError: if the model or a tokenizer is not at hand.
    """
    task = TASKS["causal-lm"]
    model, tokenizer = _load_base(base, task, run), load_processor((base, tokenizer_beside), task)
    return _ready(Path(base), base, model, tokenizer, "causal-lm", (), run)


def _load_base(base: str, task: Task, run: TrainSettings | None, **arguments: Any) -> Any:
    if run is not None and run.quantization != "none":
        arguments |= weights_as(run)  # the adapter was trained on these codes
    return load_base(base, task.model_type, **arguments)


def _ready(
    folder: Path,
    base: str,
    model: Any,
    processor: Any,
    task: TaskName,
    labels: tuple[str, ...],
    run: TrainSettings | None,
) -> Trained:
    if TASKS[task].counts_tokens and model.config.pad_token_id is None:
        model.config.pad_token_id = processor.pad_token_id
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    length = _LENGTH if run is None else run.max_length
    positions = getattr(model.config, "max_position_embeddings", None) or length
    model = model if getattr(model, "is_quantized", False) else model.to(device)
    return Trained(folder, base, model.eval(), processor, task, labels, min(length, positions), run)


class Place(NamedTuple):
    """The place of a trained model.

    Attributes:
        folder: folder of the adapter, or of the model.
        run_folder: folder of the run that wrote ``folder``, if it is known.
        run: settings of that run.
        config: config of the adapter; ``None`` for a model.
    """

    folder: Path
    run_folder: Path | None
    run: TrainSettings | None
    config: PeftConfig | None


def locate(path: str | os.PathLike[str]) -> Place:
    """Return the place of a run, an adapter or a model; no weights are read.

    Raises:
        CheckpointError: if ``path`` is not a run, an adapter or a model, or its config cannot be read.
    """
    folder, run_folder = _folders(Path(path))
    run = load_settings(run_folder / "resolved.yaml") if run_folder is not None else None
    return Place(folder, run_folder, run, read_config(folder) if (folder / CONFIG).is_file() else None)


def _folders(path: Path) -> tuple[Path, Path | None]:
    """Return the folder of the adapter or model, and the folder of its run if there is one."""
    for inner in ("adapter", "model", "head"):
        if (path / inner).is_dir() and (path / "resolved.yaml").is_file():
            return path / inner, path
    if not (path / CONFIG).is_file() and not (path / "config.json").is_file():
        if (path / "resolved.yaml").is_file():
            raise CheckpointError(unfinished(path))
        what = "has neither an adapter nor a model in it" if path.is_dir() else "is no folder"
        raise CheckpointError(f"{os.fspath(path)!r} {what}: name a run, an adapter or a model folder")
    # a checkpoint is in the folder `checkpoints` of its run
    return path, next((one for one in path.absolute().parents[:2] if (one / "resolved.yaml").is_file()), None)


_CLASSES: dict[str, TaskName] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}
"""Tasks by the end of the name of a model class."""


_PROBLEMS: dict[str, TaskName] = {
    "regression": "regression",
    "multi_label_classification": "multi-label-classification",
}
"""Tasks that share a class of models, by the ``problem_type`` of the model's config."""


def task_of(place: Place, base: str) -> TaskName:
    """Return the task of a run, or that of an adapter's config, or else that of the class of a base model.

    Raises:
        ConfigError: if none of these names a task.
    """
    if place.run is not None:
        return place.run.task
    kind = getattr(place.config, "task_type", None)
    kind = getattr(kind, "value", kind)
    if kind == "SEQ_CLS" and head_size(place.folder) == 1:
        return "regression"
    if kind == "SEQ_CLS" and (problem := _PROBLEMS.get(problem_type(place.folder) or "")):
        return problem
    for task in TASKS.values():
        if kind == task.model_type:
            return cast("TaskName", task.name)
    config = model_config(base)
    for architecture in config.architectures or ():
        for ending, name in _CLASSES.items():
            if architecture.endswith(ending):
                by_loss = _PROBLEMS.get(str(getattr(config, "problem_type", None)), name)
                return by_loss if name == "sequence-classification" else name
    raise ConfigError(f"the task of {base!r} is not known: name it by task, one of {', '.join(TASKS)}")


def _labels(folder: Path, run: TrainSettings | None, base: str) -> tuple[str, ...]:
    """Return the names of the labels: those of the run's model, of its data or of the model's config; else numbers."""
    if (known := label_names(folder)) is not None:
        return known
    count = head_size(folder)
    if run is not None:
        try:
            return tuple(load_data(run).labels)
        except ConfigError:
            pass  # the data may be gone
    names = model_config(base).id2label or {}
    if count in (None, len(names)):
        return tuple(str(names[number]) for number in sorted(names))
    return tuple(f"LABEL_{number}" for number in range(count or 0))


def load_processor(places: tuple[str, str], task: Task) -> Any:
    """Return the tokenizer or image processor of the first of two places that has one.

    Raises:
        ConfigError: if neither place has one.
    """
    for place in places:
        try:
            return task.load_processor(TrainSettings(model=place, data="", task=cast("TaskName", task.name)))
        except (ConfigError, KeyError):
            continue
    raise ConfigError(
        f"there is no {'tokenizer' if task.counts_tokens else 'image processor'} in {places[0]}, nor in its "
        f"base model {places[1]!r}"
    )
