"""What a run writes down while it runs and when it ends, as JSON, for people and for ``randlora report``."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from randlora.train.measure import StepTimer, device_memory_bytes, memory_bytes
from randlora.tuner.files.atomic import write_json, write_text

HISTORY = "history.jsonl"
PREDICTIONS = "predictions.jsonl"
ENVIRONMENT = "environment.json"
BASE_MODEL = "base_model"
HEAD = "head.safetensors"

_PACKAGES = ("randlora", "torch", "peft", "transformers", "accelerate", "datasets", "numpy", "safetensors")
_MOST_TEXT = 1000  # characters of an example that are kept


class HistoryFile(TrainerCallback):
    """Keeps ``history.jsonl``: one line for everything that is logged, there as soon as it is.

    A line of a training step also says what the step cost: ``seconds``, ``memory_bytes`` and, where there is a GPU,
    ``device_memory_bytes``. They are part of the Trainer's own log too, so that a resumed run has them. A number that
    is none (NaN, infinity) is ``null``. A process that is killed leaves whole lines but perhaps for the last.

    Args:
        folder: the run's.
        timer: measures the steps; must come before this among the callbacks.
    """

    def __init__(self, folder: Path, timer: StepTimer) -> None:
        self._path = folder / HISTORY
        self._timer = timer

    def write(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Writes the whole file anew."""
        write_text(self._path, _lines(log))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """What was logged before a resume, without the steps that were lost."""
        if state.is_world_process_zero:
            self.write(state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any) -> None:
        """Adds the newest entry."""
        entry = state.log_history[-1]
        if "loss" in entry:
            entry |= {"seconds": self._timer.seconds[-1], "memory_bytes": memory_bytes()}
            if torch.cuda.is_available():
                entry["device_memory_bytes"] = device_memory_bytes()
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_lines([entry]))


def write_environment(folder: Path) -> None:
    """Versions and machine, in ``environment.json``; no names of host or user."""
    content = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }
    write_json(content, folder, ENVIRONMENT)


def write_base_config(model: Any, folder: Path) -> None:
    """The config of the base model, in ``base_model/config.json``.

    The shapes of an adapter's layers follow from it, and without them nothing can be said of its updates: the folder
    can go to a machine that does not have the model.
    """
    (folder / BASE_MODEL).mkdir(exist_ok=True)
    write_text(folder / BASE_MODEL / "config.json", model.config.to_json_string())


def write_predictions(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """What was predicted of each evaluation example, in ``predictions.jsonl``.

    Args:
        folder: the run's.
        rows: of ``Task.records``; their texts are cut.
    """
    write_text(folder / PREDICTIONS, _lines({**row, **_cut(row)} for row in rows))


def _cut(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: row[name][:_MOST_TEXT] for name in ("text", "text_pair") if name in row}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(
        json.dumps({key: _finite(value) for key, value in row.items()}, ensure_ascii=False) + "\n" for row in rows
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
