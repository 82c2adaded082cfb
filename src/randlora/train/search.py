"""The search for the learning rate of a run, by short runs on a part of its training data.

Rates are 1 and 3 of each decade. The search begins at the method's default and goes to the better neighbour until both
neighbours of the best rate are worse, so that the best rate is not an end of a grid. Every rate gets a whole run,
warm-up and decay included, of the same steps, data and seed. The loss on held-out training data decides, because it
tells rates apart that the accuracy on few examples does not. Optuna keeps the rates tried, so that a search can go on,
and ends a run that is behind the others half-way.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from randlora.errors import ConfigError, RandLoraError
from randlora.train.data import with_task_of_labels
from randlora.train.settings import TrainSettings
from randlora.train.short_run import short_run, shortened, whole_examples
from randlora.train.split import keep_split
from randlora.train.trackers import trackers

MOST = 7  # rates of a search: three decades
_RATE = FloatDistribution(1e-9, 1e3, log=True)
_LEAST_STEPS = 20  # of a run of a search, or all steps of a shorter run
_SHARE = 5  # steps of the run by steps of each run of its search
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        rate: the best learning rate.
        losses: loss on the held-out training data by rate; infinite where the run was ended before its last step.
        enclosed: whether both neighbours of the best were tried and are worse.
    """

    rate: float
    losses: dict[float, float]
    enclosed: bool


class Search:
    """A search, one short run at a time.

    Args:
        settings: settings of the run; its evaluation data is not read.
        folder: folder for the rates tried.
        name: name of this search among those of the folder.
        steps: steps of each short run.

    Raises:
        ConfigError: if the folder has a search of this name with other settings.
    """

    def __init__(self, settings: TrainSettings, folder: Path, name: str, steps: int) -> None:
        self._short = shortened(settings, steps)
        self._study = _study(folder, name, self._short)

    @property
    def next(self) -> float | None:
        """The rate to try next; ``None`` at the end."""
        return next_rate(_tried(self._study), self._short.default_rate)

    def go_on(self) -> str:
        """Try the next rate; return a line with its loss."""
        rate = self.next
        if rate is None:
            raise RuntimeError("the search has ended")
        loss = _try(self._study, self._short, rate)
        return f"learning rate {rate:g}: " + (f"loss {loss:.4f}" if math.isfinite(loss) else "ended, too far behind")

    @property
    def found(self) -> Found:
        """The best rate so far.

        Raises:
            RandLoraError: if no rate gave a finite loss.
        """
        losses = _tried(self._study)
        best = min(losses, key=lambda one: losses[one])
        if not math.isfinite(losses[best]):
            tried = ", ".join(f"{one:g}" for one in sorted(losses))
            raise RandLoraError(f"no learning rate of {tried} gave a finite loss")
        return Found(best, dict(sorted(losses.items())), {_step(best, 1), _step(best, -1)} <= losses.keys())


def with_found_rate(settings: TrainSettings, say: Callable[[str], None] = lambda _: None) -> TrainSettings:
    """Return ``settings`` with a learning rate found by a search, if theirs is ``auto``.

    Each rate gets a run of a fifth of the steps, 20 at least. The folder ``search`` of the run keeps the rates tried.

    Raises:
        ConfigError: if the data or the model cannot be used, or in one of several processes.
    """
    if settings.learning_rate != "auto":
        return settings
    require_one_process("learning_rate='auto'")
    trackers(settings)  # the search reports to none, and the run would refuse theirs only afterwards
    settings = with_task_of_labels(settings)
    folder = Path(settings.output_dir) / "search"
    plain = settings.model_copy(update={"learning_rate": None})
    here = keep_split(plain, folder / "data")
    with short_run(shortened(here, 2), []) as (_, trainer):
        whole = steps_of(settings, whole_examples(trainer))
    steps = min(max(_LEAST_STEPS, whole // _SHARE), whole)
    search = Search(here, folder, "train", steps)
    while search.next is not None:
        say(search.go_on())
    found = search.found
    say(f"takes {found.rate:g}" + ("" if found.enclosed else ", the last rate tried on its side"))
    return settings.model_copy(update={"learning_rate": found.rate})


def require_one_process(what: str) -> None:
    """Raise in one of several processes, each of which would do the same work.

    Raises:
        ConfigError: in one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{what} is for one process: find the rate there, and name it in several")


def steps_of(settings: TrainSettings, examples: int) -> int:
    """Return the number of optimizer steps of a run on so many prepared examples."""
    batches = math.ceil(examples / settings.batch_size)
    return settings.max_steps or math.ceil(settings.epochs * math.ceil(batches / settings.gradient_accumulation))


def next_rate(losses: dict[float, float], start: float) -> float | None:
    """Return the rate to try next; ``None`` if the best is between two worse ones, or enough were tried.

    Args:
        losses: losses by rate.
        start: the first rate.
    """
    if not losses:
        return _step(start, 0)
    if len(losses) >= MOST:
        return None
    best = min(losses, key=lambda one: losses[one])
    if not math.isfinite(losses[best]):
        return _step(min(losses), -1)
    return next((near for near in (_step(best, 1), _step(best, -1)) if near not in losses), None)


def _step(rate: float, up: int) -> float:
    """Return the rate ``up`` half decades higher, among 1 and 3 of each decade."""
    decade, half = divmod(round(2 * math.log10(rate)) + up, 2)
    return float(f"{3 if half else 1}e{decade}")


def _study(folder: Path, name: str, short: TrainSettings) -> optuna.Study:
    """Return the study of this name in the folder, or a new study.

    Raises:
        ConfigError: if the study of this name has other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=name,
        storage=JournalStorage(JournalFileBackend(str(folder / "search.log"))),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
        load_if_exists=True,
    )
    now = json.loads(json.dumps(short.model_dump(exclude={"output_dir"})))
    then = study.user_attrs.get("settings", now)
    if then != now:
        changed = [key for key in now if then.get(key) != now[key]]
        raise ConfigError(
            f"{str(folder)!r} holds a search of a run with other settings ({', '.join(changed)}): remove that folder, "
            "or choose another output_dir"
        )
    study.set_user_attr("settings", now)
    return study


def _tried(study: optuna.Study) -> dict[float, float]:
    """Return the losses by rate, infinite where a run was ended."""
    done = TrialState.COMPLETE
    return {
        trial.params["learning_rate"]: math.inf if trial.value is None or trial.state != done else trial.value
        for trial in study.get_trials(states=_ENDED)
    }


def _try(study: optuna.Study, short: TrainSettings, rate: float) -> float:
    """Return the loss of a short run at this rate; infinite if the run was ended early."""
    if not study.get_trials(states=(TrialState.WAITING,)):  # one waits if the process was killed between these lines
        study.enqueue_trial({"learning_rate": rate})
    trial = study.ask({"learning_rate": _RATE})
    report = _Report(trial)
    try:
        with short_run(short.model_copy(update={"learning_rate": rate}), [report]) as (_, trainer):
            trainer.train()
    except FloatingPointError:
        report.loss = math.inf
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    if math.isfinite(report.loss):
        study.tell(trial, report.loss)
    else:
        study.tell(trial, state=TrialState.PRUNED)
    return report.loss


class _Report(TrainerCallback):
    """A callback that reports the loss of each evaluation to Optuna, and ends the run if Optuna prunes it."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.loss = math.inf
        self._trial = trial

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the loss; a run that ends here gets an infinite loss."""
        self.loss = float(kwargs["metrics"]["eval_loss"])
        if not math.isfinite(self.loss):
            control.should_training_stop = True
            return
        self._trial.report(self.loss, state.global_step)
        if state.global_step < state.max_steps and self._trial.should_prune():
            self.loss = math.inf
            control.should_training_stop = True
