"""Trackers of Transformers, to which a run reports besides its own files."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

from randlora.errors import ConfigError
from randlora.train.settings import TrainSettings

_STARTS = ("on_init_end", "on_train_begin")
"""The events at which trackers begin a run."""
_REMEDIES = {
    "comet_ml": "set COMET_API_KEY, or COMET_START_ONLINE=0 without a network",
    "mlflow": "let MLFLOW_TRACKING_URI name a server that runs, or a file such as sqlite:///mlflow.db",
    "tensorboard": "let TENSORBOARD_LOGGING_DIR name a folder that can be written",
    "trackio": "unset TRACKIO_SPACE_ID, or log in by `hf auth login`",
    "wandb": "log in by `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline",
}


class Trackers(TrainerCallback):
    """Trackers that stay open after the last step, and get the metrics of the final evaluation.

    A tracker that does not start is a ConfigError. One that fails later gets no more, with a warning: the run's folder
    has all that trackers get, and a run must not end with its tracker.

    By default TensorBoard's and MLflow's trackers do not get these metrics, and Trackio's puts them into a second run.
    """

    def __init__(self, trackers: Mapping[str, TrainerCallback]) -> None:
        self._trackers = dict(trackers)
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
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, event)(*given, **more)
            except Exception as error:  # of any kind: each tracker's library has its own
                reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
                if event in _STARTS:
                    remedy = _REMEDIES.get(name, "its settings are environment variables")
                    raise ConfigError(
                        f"report_to={name!r} does not start: {remedy}, or train without it, `--report-to none` "
                        f"(docs/trackers.md). It says: {reason}"
                    ) from error
                warnings.warn(f"{name} has failed and gets no more of this run: {reason}", stacklevel=2)
                del self._trackers[name]


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
        return Trackers({name: INTEGRATION_TO_CALLBACK[name]() for name in names})
    except (RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to={names}: {error}") from None


def close_trackers(trainer: Trainer) -> None:
    """End the run in all trackers of a Trainer."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Trackers):
            callback.close()
