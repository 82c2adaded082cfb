"""Trackers of Transformers, to which a run reports besides its own files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_reporting_integration_callbacks

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings


class Trackers(TrainerCallback):
    """Trackers that stay open after the last step, and get the metrics of the final evaluation.

    By default TensorBoard's and MLflow's trackers do not get these metrics, and Trackio's puts them into a second run.
    """

    def __init__(self, trackers: Sequence[TrainerCallback]) -> None:
        self._trackers = trackers
        self._end: Callable[[], None] | None = None
        for event in vars(TrainerCallback):
            if event.startswith("on_") and event not in vars(Trackers):
                setattr(self, event, partial(self._tell, event))

    def on_train_end(self, *given: Any, **more: Any) -> None:
        """Put off the end of the run in the trackers until :meth:`close`."""
        self._end = partial(self._tell, "on_train_end", *given, **more)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **more: Any
    ) -> None:
        """Log the metrics as those of an evaluation, if training has ended in this process."""
        if self._end is not None:
            self._tell("on_log", args, state, control, logs=metrics, **more)

    def close(self) -> None:
        """End the run in each tracker, if training has ended."""
        if self._end is not None:
            self._end()
            self._end = None

    def _tell(self, event: str, *given: Any, **more: Any) -> None:
        for tracker in self._trackers:
            getattr(tracker, event)(*given, **more)


def trackers(settings: TrainSettings) -> Trackers:
    """Return the trackers of a run, as one callback.

    Raises:
        ConfigError: naming a tracker that Transformers does not know, or whose package is not installed.
    """
    names = settings.report_to
    if names is None:
        names = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    names = [name for name in names if name != "none"]
    unknown = sorted(set(names) - set(INTEGRATION_TO_CALLBACK))
    if unknown:
        raise ConfigError(f"report_to={unknown}: known are none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
    try:
        return Trackers([tracker() for tracker in get_reporting_integration_callbacks(names)])
    except (RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to={names}: {error}") from None


def close_trackers(trainer: Trainer) -> None:
    """End the run in all trackers of a Trainer."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Trackers):
            callback.close()
