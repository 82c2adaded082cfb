"""The JSON files that a run writes, for people and for ``randlora report``."""

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
from randlora.tuner.files.adapter_folder import BASE_MODEL
from randlora.tuner.files.atomic import write_json, write_text

HISTORY = "history.jsonl"
PREDICTIONS = "predictions.jsonl"
ENVIRONMENT = "environment.json"
HEAD = "head.safetensors"

_PACKAGES = ("randlora", "torch", "peft", "transformers", "accelerate", "datasets", "numpy", "safetensors")
_MOST_TEXT = 1000  # characters of an example that are kept


class HistoryFile(TrainerCallback):
    """The writer of ``history.jsonl``: one line for each entry of the Trainer's log, written at once.

    The line of a training step also has the cost of the step: ``seconds``, ``memory_bytes`` and, with a GPU,
    ``device_memory_bytes``. These are part of the Trainer's own log too, so that a resumed run has them. NaN and
    infinity are written as ``null``. After a killed process, only the last line may be cut off.

    Args:
        folder: the run's folder.
        timer: measures the steps; must come before this callback in the list of callbacks.
    """

    def __init__(self, folder: Path, timer: StepTimer) -> None:
        self._path = folder / HISTORY
        self._timer = timer

    def write(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Write the whole file anew."""
        write_text(self._path, _lines(log))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Write the log from before a resume, without the steps that were lost."""
        if state.is_world_process_zero:
            self.write(state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any) -> None:
        """Add the newest entry of the log."""
        entry = state.log_history[-1]
        if "loss" in entry:
            entry |= {"seconds": self._timer.seconds[-1], "memory_bytes": memory_bytes()}
            if torch.cuda.is_available():
                entry["device_memory_bytes"] = device_memory_bytes()
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_lines([entry]))


def write_environment(folder: Path) -> None:
    """Write versions and machine to ``environment.json``, without names of host or user."""
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
    """Write the config of the base model to ``base_model/config.json``.

    The config gives the shapes of an adapter's layers, without which its updates are unknown on a machine that does not
    have the model.
    """
    (folder / BASE_MODEL).mkdir(exist_ok=True)
    write_text(folder / BASE_MODEL / "config.json", model.config.to_json_string())


def write_predictions(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the prediction for each evaluation example to ``predictions.jsonl``.

    Args:
        folder: the run's folder.
        rows: as ``Task.records`` yields them; texts are cut.
    """
    write_text(folder / PREDICTIONS, _lines({**row, **_cut(row)} for row in rows))


def _cut(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: row[name][:_MOST_TEXT] for name in ("text", "text_pair") if name in row}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(
        json.dumps({key: _finite(value) for key, value in row.items()}, ensure_ascii=False) + "\n" for row in rows
    )


def _finite(value: Any) -> Any:
    """Return a value, or ``None`` for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
