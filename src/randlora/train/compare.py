"""A comparison of methods on the user's data: a rate for each, and the same seeds, data and steps for all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import yaml
from datasets import load_from_disk
from pydantic import ValidationError

from randlora.errors import ConfigError, RandLoraError
from randlora.train.compare_settings import CompareSettings
from randlora.train.data import with_task_of_labels
from randlora.train.forgetting import Forgetting
from randlora.train.own_process import train_in_own_process
from randlora.train.run import train
from randlora.train.search import MOST, Found, Search, require_one_process
from randlora.train.settings import TrainSettings
from randlora.train.short_run import MOST_SELECTED, SELECTION, free_memory
from randlora.train.split import EVALUATION, TRAINING, keep_split
from randlora.train.tasks import TASKS
from randlora.train.time_plan import LEAST_SEEDS, Cost, Plan, Times, make_plan, measure_cost, seconds_to_start
from randlora.tuner.files.atomic import write_json, write_text

_SETTINGS, _PLAN, _RATES, _FORGOTTEN = "compare.yaml", "plan.json", "rates.json", "forgetting.json"
_MAY_DIFFER = {"minutes", "output_dir"}
_LEAST_TURNS = 3  # rates of each search, even when late: fewer do not enclose a best one

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """One method of the comparison, a row of the table.

    Attributes:
        name: name of its folders.
        label: name in the output.
        changes: its settings that differ from the shared ones.
        lora: name of the LoRA that trains about as many values, if there is one.
    """

    name: str
    label: str
    changes: dict[str, Any]
    lora: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A comparison that is ready to start.

    Attributes:
        settings: settings of the comparison.
        folder: output folder.
        shared: settings of all runs, which read the data as split.
        candidates: in the order of the table.
        costs: cost of each candidate by name.
        times: durations that follow from the costs.
        plan: the planned searches and runs.
    """

    settings: CompareSettings
    folder: Path
    shared: TrainSettings
    candidates: tuple[Candidate, ...]
    costs: dict[str, Cost]
    times: Times
    plan: Plan

    def run(self, candidate: Candidate, **changes: Any) -> TrainSettings:
        """Return the settings of a candidate's runs."""
        return self.shared.model_copy(update={**candidate.changes, **changes})


@dataclass(frozen=True)
class Measured:
    """The results of a candidate.

    Attributes:
        candidate: the candidate.
        found: its learning rate.
        runs: the folders of its runs, by seed.
        forgotten: forgetting by seed; empty where none was measured.
    """

    candidate: Candidate
    found: Found
    runs: tuple[Path, ...]
    forgotten: tuple[float, ...]


def prepare(settings: CompareSettings, resume: bool, say: Say) -> Prepared:
    """Split the data, measure each method and plan; or read the plan of an earlier call.

    Raises:
        ConfigError: if data, model or methods cannot be used, the time is too short, or the folder has another
            comparison.
    """
    require_one_process("a comparison")
    begin = monotonic()
    folder = Path(settings.output_dir)
    _claim(folder, settings, resume)
    shared = keep_split(with_task_of_labels(settings.of_run()), folder / "data").model_copy(
        update={"report_to": ["none"]}
    )
    rows = {name: len(load_from_disk(str(folder / "data" / name))) for name in (TRAINING, EVALUATION)}
    if rows[EVALUATION] < 2:
        raise ConfigError("the evaluation data has a single row: nothing can be said of the spread")
    if (folder / _PLAN).is_file():
        say(f"Going on with the plan of {folder}.")
    else:
        say("Measuring what each method costs here …")
        candidates, costs = _measure(settings, shared, say)
        write_json(
            {
                "candidates": [asdict(one) for one in candidates],
                "costs": {name: asdict(cost) for name, cost in costs.items()},
                "start": seconds_to_start(),
            },
            folder,
            _PLAN,
        )
    content = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    costs = {name: Cost(**cost) for name, cost in content["costs"].items()}
    forgetting = forgetting_of(settings)
    other = 0 if forgetting is None else len(forgetting)
    selection = min(round(SELECTION * rows[TRAINING]), MOST_SELECTED)
    times = Times(list(costs.values()), content["start"], selection, rows[EVALUATION] + other)
    if "plan" not in content:
        content["plan"] = asdict(make_plan(times, 60 * settings.minutes - (monotonic() - begin)))
        write_json(content, folder, _PLAN)
    candidates = [Candidate(**one) for one in content["candidates"]]
    return Prepared(settings, folder, shared, tuple(candidates), costs, times, Plan(**content["plan"]))


def only_plan(settings: CompareSettings, say: Say) -> Prepared:
    """Measure and plan as :func:`prepare`, and keep no files."""
    with tempfile.TemporaryDirectory() as nothing:
        return prepare(settings.model_copy(update={"output_dir": nothing}), False, say)


def search_rates(ready: Prepared, deadline: float, say: Say) -> dict[str, Found]:
    """Find a learning rate for each candidate.

    The candidates take turns, so that all have as many tries when only the time for three seeds is left. A candidate
    that no rate trains is left out, and named. Rates in the folder are read, not searched again.

    Args:
        ready: the comparison.
        deadline: end of the whole comparison, by ``time.monotonic``.
        say: called with a line for each rate and its loss.
    """
    file = ready.folder / _RATES
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {name: Found(one["rate"], dict(one["losses"]), one["enclosed"]) for name, one in kept.items()}
    until = deadline - ready.plan.start_seconds - LEAST_SEEDS * ready.plan.round_seconds
    steps, folder = ready.plan.search_steps, ready.folder / "search"
    searches = {one.name: Search(ready.run(one), folder, one.name, steps) for one in ready.candidates}
    for turn in range(MOST):
        for one in [one for one in ready.candidates if one.name in searches]:
            search = searches[one.name]
            if search.next is None or (turn >= _LEAST_TURNS and monotonic() > until):
                continue
            try:
                say(f"{one.label}, {steps} steps: {search.go_on()}")
            except torch.OutOfMemoryError as error:
                say(f"{one.label} is left out: {_reason(error)}")
                del searches[one.name]
    found = {}
    for one in [one for one in ready.candidates if one.name in searches]:
        try:
            found[one.name] = searches[one.name].found
        except RandLoraError as error:
            say(f"{one.label} is left out: {_reason(error)}")
    if not found:
        raise RandLoraError("no method could be trained at any rate that was tried")
    content = {name: {**asdict(one), "losses": list(one.losses.items())} for name, one in found.items()}
    write_json(content, ready.folder, _RATES)
    return found


def repeat(ready: Prepared, found: dict[str, Found], deadline: float, say: Say) -> list[Measured]:
    """Train every candidate with one seed after the other, as many as planned or as the time allows.

    A candidate whose run fails is left out of the following runs, and named. Finished runs are not trained again.

    Args:
        ready: the comparison.
        found: learning rates by name of the candidate.
        deadline: a seed that would end later does not start; by ``time.monotonic``.
        say: called with lines about the progress.
    """
    kept = [one for one in ready.candidates if one.name in found]
    forgetting = forgetting_of(ready.settings)
    pace, seeds = _Pace(ready, kept), 0
    for seed in range(ready.plan.seeds):
        missing = [one for one in kept if not _is_done(_run_folder(ready, one, seed))]
        if seed and missing and monotonic() + pace.expected(missing, seed) > deadline:
            say(f"The time allows {seed} of {ready.plan.seeds} seeds.")
            break
        for one in missing:
            say(f"Seed {seed + 1} of {ready.plan.seeds}: {one.label}; {pace.left(seed) / 60:.0f} min left …")
            begin = monotonic()
            try:
                _train(ready, one, found[one.name].rate, seed, forgetting)
            except (RandLoraError, FloatingPointError, torch.OutOfMemoryError) as error:
                say(f"{one.label} is left out: {_reason(error)}")
                kept.remove(one)
            pace.took(one, seed, monotonic() - begin)
        seeds += 1
    if not kept:
        raise RandLoraError("no method came to an end")
    return [_measured(ready, one, found[one.name], seeds) for one in kept]


class _Pace:
    """The duration of runs, relative to the plan."""

    def __init__(self, ready: Prepared, kept: list[Candidate]) -> None:
        self._ready, self._kept = ready, kept
        self._planned = self._spent = 0.0

    def took(self, one: Candidate, seed: int, seconds: float) -> None:
        """Add the duration of a run that has ended."""
        self._planned += self._plan(one, seed)
        self._spent += seconds

    def expected(self, runs: list[Candidate], seed: int) -> float:
        """Return the expected seconds of these runs."""
        slower = self._spent / self._planned if self._planned else 1.0
        return slower * sum(self._plan(one, seed) for one in runs)

    def left(self, seed: int) -> float:
        """Return the expected seconds to the end of the last seed, during seed number ``seed``."""
        return sum(
            self.expected([one for one in self._kept if not _is_done(_run_folder(self._ready, one, other))], other)
            for other in range(seed, self._ready.plan.seeds)
        )

    def _plan(self, one: Candidate, seed: int) -> float:
        times = self._ready.times
        return times.run(self._ready.costs[one.name], self._ready.plan.steps) + (0.0 if seed else times.start)


def forgetting_of(settings: CompareSettings) -> Forgetting | None:
    """Return the measure of forgetting on the other data; ``None`` where the settings name no other data."""
    return None if settings.other_data is None else Forgetting(settings.of_run(), settings.other_data)


def _claim(folder: Path, settings: CompareSettings, resume: bool) -> None:
    """Write the settings into the folder; raise if it has another comparison, or this one without ``resume``.

    A comparison that ended before it had a plan, such as by a column that is not there, gives way to this one.
    """
    file = folder / _SETTINGS
    now = json.loads(settings.model_dump_json())
    if file.is_file():
        then = yaml.safe_load(file.read_text(encoding="utf-8"))
        changed = [f"{key}: {then.get(key)!r} there, {now[key]!r} here" for key in now if then.get(key) != now[key]]
        changed = [line for line in changed if line.partition(":")[0] not in _MAY_DIFFER]
        if resume and not changed:
            return
        if _has_plan(folder):
            if resume:
                others = "\n  ".join(changed)
                raise ConfigError(f"{str(folder)!r} holds a comparison with other settings:\n  {others}")
            raise ConfigError(
                f"output_dir={str(folder)!r} holds a comparison: go on with it by --resume, or name another folder"
            )
        shutil.rmtree(folder / "data", ignore_errors=True)
        (folder / _PLAN).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(now, sort_keys=False))


def _has_plan(folder: Path) -> bool:
    file = folder / _PLAN
    return file.is_file() and "plan" in json.loads(file.read_text(encoding="utf-8"))


def _measure(settings: CompareSettings, shared: TrainSettings, say: Say) -> tuple[list[Candidate], dict[str, Cost]]:
    """Return the candidates that can be trained, and their costs; LoRA's ranks match RandLoRA's counts."""
    costs: dict[str, Cost] = {}

    def takes(one: Candidate) -> bool:
        try:
            TrainSettings.model_validate(shared.model_dump() | one.changes)
            costs[one.name] = cost = measure_cost(shared.model_copy(update=one.changes))
        except (ValidationError, ConfigError, torch.OutOfMemoryError) as error:
            if one.changes["method"] == "randlora" and not isinstance(error, torch.OutOfMemoryError):
                raise
            say(f"{one.label} is left out: {_reason(error)}")
            return False
        say(f"{one.label}: {cost.trainable:,} values train, {cost.step:.3g} s a step")
        return True

    ours, loras, others = [], {}, []
    for way, label in (("randlora", "RandLoRA"), ("structured", "structured RandLoRA")):
        for r in settings.ranks if way in settings.methods else ():
            changes = {"method": "randlora", "r": r, "structured": way == "structured"}
            one = Candidate(f"{way}-r{r}", f"{label} r={r}", changes)
            if not takes(one):
                continue
            rank = costs[one.name].lora_rank or 1
            lora = Candidate(f"lora-r{rank}", f"LoRA r={rank}", {"method": "lora", "r": rank})
            if "lora" in settings.methods and (lora.name in loras or takes(lora)):
                loras[lora.name] = lora
                one = Candidate(one.name, one.label, changes, lora.name)
            ours.append(one)
    for way, label in (("full", "full fine-tuning"), ("head", "head alone")):
        one = Candidate(way, label, {"method": way})
        if way == "head" and not TASKS[settings.task].classifies:
            say(f"{label} is left out: {settings.task} has no new head")
        elif way in settings.methods and takes(one):
            others.append(one)
    if not ours:
        raise RandLoraError("RandLoRA could not be trained: nothing to compare")
    return [*ours, *loras.values(), *others], costs


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["ctx"]["error"])
    return str(error).partition("\n")[0]


def _run_folder(ready: Prepared, one: Candidate, seed: int) -> Path:
    return ready.folder / f"seed-{ready.settings.seed + seed}" / one.name


def _is_done(run: Path) -> bool:
    """Return whether a run is complete: its checkpoints are removed last."""
    return (run / "metrics.json").is_file() and not (run / "checkpoints").exists()


def _train(ready: Prepared, one: Candidate, rate: float, seed: int, forgetting: Forgetting | None) -> None:
    """Train a run to its end, from its last checkpoint if there is one; whole models are not kept.

    The run of the first seed has a process of its own, so that the peak memory is that of the run. Runs of other seeds
    save the time to start a process.
    """
    folder = _run_folder(ready, one, seed)
    run = ready.run(
        one,
        learning_rate=rate,
        seed=ready.settings.seed + seed,
        max_steps=ready.plan.steps,
        save_steps=ready.plan.steps,
        output_dir=str(folder),
        resume="auto",
    )
    if seed == 0:
        train_in_own_process(run, offline=False)
    else:
        train(run)
        free_memory()
    if forgetting is not None:
        write_json({"forgotten": forgetting.of(folder)}, folder, _FORGOTTEN)
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _measured(ready: Prepared, one: Candidate, found: Found, seeds: int) -> Measured:
    runs = tuple(_run_folder(ready, one, seed) for seed in range(seeds))
    files = [run / _FORGOTTEN for run in runs]
    forgotten = [json.loads(file.read_text(encoding="utf-8"))["forgotten"] for file in files if file.is_file()]
    return Measured(one, found, runs, tuple(forgotten))
