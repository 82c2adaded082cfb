"""Callbacks that end a run early, at Ctrl-C or at a loss that is not finite; a warning for runs that do not learn."""

from __future__ import annotations

import math
import signal
import threading
import warnings
from statistics import fmean
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from randlora.analysis import first_not_finite


class CheckpointOnInterrupt(TrainerCallback):
    """A callback that ends a run at Ctrl-C after a checkpoint of the current step; at a second Ctrl-C, at once.

    Without the callback, a run would lose all steps since its last checkpoint.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    @staticmethod
    def happened(trainer: Trainer) -> bool:
        """Return whether Ctrl-C ended the run."""
        found = (one for one in trainer.callback_handler.callbacks if isinstance(one, CheckpointOnInterrupt))
        return any(one._asked for one in found)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to handle Ctrl-C, in the main thread; other threads cannot."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of the run, after a Ctrl-C."""
        if self._asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the earlier handler of Ctrl-C."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_signal: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


class StopIfDiverged(TrainerCallback):
    """A callback that ends a run at its first loss that is not finite, before the next checkpoint."""

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise if the loss is not finite.

        Raises:
            FloatingPointError: if the loss is infinite or NaN.
        """
        loss = kwargs["logs"].get("loss", 0.0)
        if not math.isfinite(loss):
            found = first_not_finite(kwargs["model"])
            raise FloatingPointError(
                f"the training loss of step {state.global_step} is {loss}: lower "
                f"learning_rate={self._learning_rate} or alpha" + (f". Not finite: {found}" if found else "")
            )


def warn_unless_learned(state: TrainerState, learning_rate: float) -> None:
    """Warn if the last tenth of the losses is not lower than the first tenth; runs of few steps are not judged.

    A rate that is too high need not end in NaN: the loss may rise and come back to the loss of guessing.
    """
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    tenth = len(losses) // 10
    if tenth < 2:
        return
    first, last = fmean(losses[:tenth]), fmean(losses[-tenth:])
    if last > 0.99 * first:
        warnings.warn(
            f"the training loss has not fallen: {first:.4f} in the first tenth of the steps, {last:.4f} in the last. "
            f"learning_rate={learning_rate} or alpha is too high, or far too low",
            stacklevel=2,
        )
