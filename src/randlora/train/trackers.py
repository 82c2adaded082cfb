"""What a run reports to, besides its own files: trackers of Transformers, to the end of the run."""

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
    """Trackers that stay open after the last step, and get the metrics of the evaluation that comes then.

    By themselves TensorBoard's and MLflow's would not have them, and Trackio's would put them into a second run.
    """

    def __init__(self, trackers: Sequence[TrainerCallback]) -> None:
        self._trackers = trackers
        self._end: Callable[[], None] | None = None
        for event in vars(TrainerCallback):
            if event.startswith("on_") and event not in vars(Trackers):
                setattr(self, event, partial(self._tell, event))

    def on_train_end(self, *given: Any, **more: Any) -> None:
        """Waits for :meth:`close`."""
        self._end = partial(self._tell, "on_train_end", *given, **more)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **more: Any
    ) -> None:
        """Logs the metrics as those of any evaluation, where the run has begun here."""
        if self._end is not None:
            self._tell("on_log", args, state, control, logs=metrics, **more)

    def close(self) -> None:
        """Ends the run in each tracker, if it has come to its last step."""
        if self._end is not None:
            self._end()
            self._end = None

    def _tell(self, event: str, *given: Any, **more: Any) -> None:
        for tracker in self._trackers:
            getattr(tracker, event)(*given, **more)


def trackers(settings: TrainSettings) -> Trackers:
    """The trackers of a run, as one callback.

    Raises:
        ConfigError: naming a tracker that Transformers does not know, or that is not installed.
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
    """Ends the runs of all trackers."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Trackers):
            callback.close()
