"""Reading the folder of a training run. Files may be missing or cut off if the run was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from randlora.errors import ConfigError

Entry = dict[str, Any]

_STATE, _ADAPTER = "trainer_state.json", "adapter_config.json"


@dataclass(frozen=True)
class Run:
    """The known facts about a run; all but name and folder may be missing.

    Attributes:
        name: name in the report, different for each run.
        folder: folder of the run.
        settings: settings of ``randlora train``.
        adapter_config: config of the adapter, of any PEFT method.
        environment: versions and machine.
        result: content of ``metrics.json``; empty if the run has not ended.
        log: entries that the Trainer logged, oldest first.
        examples: predictions on the evaluation data.
        adapter: folder of the adapter, or of the newest checkpoint if the run has not ended.
        base: folder with the config of the base model, if the run left one.
        remarks: files that could not be read, and why.
    """

    name: str
    folder: Path
    settings: Entry = field(default_factory=dict)
    adapter_config: Entry = field(default_factory=dict)
    environment: Entry = field(default_factory=dict)
    result: Entry = field(default_factory=dict)
    log: list[Entry] = field(default_factory=list)
    examples: list[Entry] = field(default_factory=list)
    adapter: Path | None = None
    base: Path | None = None
    remarks: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The method: randlora, lora, full, head, or another method of PEFT; empty if no file names one."""
        return str(self.settings.get("method") or self.adapter_config.get("peft_type") or "").lower()

    @property
    def steps(self) -> list[Entry]:
        """The logged training steps."""
        return [entry for entry in self.log if "loss" in entry]

    @property
    def evaluations(self) -> list[Entry]:
        """The logged evaluations, and the evaluation at the end of the run."""
        found = [entry for entry in self.log if any(key.startswith("eval_") for key in entry)]
        last = self.result.get("metrics")
        if isinstance(last, dict):
            step = self.result.get("steps")
            found = [entry for entry in found if entry.get("step") != step]
            found.append({**{k: v for k, v in last.items() if k.startswith("eval_")}, "step": step})
        return found

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss is NaN or infinite; ``None`` if all losses are finite."""
        return next((entry.get("step") for entry in self.steps if math.isnan(number(entry["loss"]))), None)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in the folders, under different names. A folder that is given twice counts once.

    Raises:
        ConfigError: if a folder is not a run.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    return [_read(folder, name) for folder, name in zip(unique, _names(unique), strict=True)]


def number(value: object) -> float:
    """Return a finite number as float, and NaN for any other value."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        exact = float(value)
    except OverflowError:
        return math.nan
    return exact if math.isfinite(exact) else math.nan


def _read(folder: Path, name: str) -> Run:
    checkpoints = _checkpoints(folder)
    adapter = next((p for p in (folder / "adapter", folder, *checkpoints) if (p / _ADAPTER).is_file()), None)
    states = [p / _STATE for p in (folder, *checkpoints) if (p / _STATE).is_file()]
    traces = ("history.jsonl", "metrics.json", "resolved.yaml")
    if adapter is None and not states and not any((folder / trace).is_file() for trace in traces):
        raise ConfigError(_no_run(folder, traces))
    reader = _Reader()
    log = reader.lines(folder / "history.jsonl")
    if not log and states:
        log = reader.mapping(states[0]).get("log_history", [])
    if adapter is not None and adapter in checkpoints:
        reader.remarks.append(f"no final adapter: its layers are those of {adapter.name}")
    base = folder / "base_model"
    return Run(
        name=name,
        folder=folder,
        settings=reader.mapping(folder / "resolved.yaml"),
        adapter_config={} if adapter is None else reader.mapping(adapter / _ADAPTER),
        environment=reader.mapping(folder / "environment.json"),
        result=reader.mapping(folder / "metrics.json"),
        log=[entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else [],
        examples=reader.lines(folder / "predictions.jsonl"),
        adapter=adapter,
        base=base if (base / "config.json").is_file() else None,
        remarks=tuple(reader.remarks),
    )


class _Reader:
    """A reader of files that may be missing, cut off or broken. Its ``remarks`` name the broken files."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def mapping(self, path: Path) -> Entry:
        """Return the object in a JSON or YAML file; empty if the file cannot be read."""
        text = self._text(path)
        try:
            content = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(text) if text.strip() else {}
        except (ValueError, yaml.YAMLError, RecursionError):
            self.remarks.append(f"{path.name} cannot be read")
            return {}
        return content if isinstance(content, dict) else {}

    def lines(self, path: Path) -> list[Entry]:
        """Return the objects in the lines of a file, without a last line that was cut off."""
        found, broken = [], 0
        *lines, rest = self._text(path).split("\n")  # not splitlines: a JSON string may contain other line separators
        for line in filter(str.strip, lines):
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):
                broken += 1
        with suppress(ValueError, RecursionError):
            found += [json.loads(rest)] if rest else []
        if broken:
            self.remarks.append(f"{broken} lines of {path.name} cannot be read")
        return [entry for entry in found if isinstance(entry, dict)]

    def _text(self, path: Path) -> str:
        if not path.is_file():
            return ""
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            self.remarks.append(f"{path.name} cannot be read: {error.strerror}")
            return ""


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, newest first, without those that the Trainer has not finished writing."""
    found = [path.parent for where in ("checkpoints/", "") for path in folder.glob(f"{where}checkpoint-*/{_STATE}")]
    numbered = [path for path in found if path.name.rpartition("-")[2].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _no_run(folder: Path, traces: Iterable[str]) -> str:
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r}"
    inside = sorted({str(path.parent) for trace in (*traces, _STATE, _ADAPTER) for path in folder.glob(f"*/{trace}")})
    hint = f"; it holds {', '.join(inside)}: name these" if inside else ""
    return f"{str(folder)!r} is no run: it has none of {', '.join(traces)}, {_STATE} and {_ADAPTER}{hint}"


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ from each other."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return names
