"""What ends a run before its last step, Ctrl-C or a loss that is no number; and a word on runs that came to nothing."""

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
    """At Ctrl-C, finishes the step and writes a checkpoint; at a second one, ends at once.

    Without it, a run would lose all since its last checkpoint.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    @staticmethod
    def happened(trainer: Trainer) -> bool:
        """Whether the run ended by Ctrl-C."""
        found = (one for one in trainer.callback_handler.callbacks if isinstance(one, CheckpointOnInterrupt))
        return any(one._asked for one in found)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listens to Ctrl-C, which only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Writes and ends, if that was asked for."""
        if self._asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listens no more."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_signal: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


class StopIfDiverged(TrainerCallback):
    """Ends a run at its first loss that is no number, before a checkpoint of it could be written."""

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the loss.

        Raises:
            FloatingPointError: if it is infinite or NaN.
        """
        loss = kwargs["logs"].get("loss", 0.0)
        if not math.isfinite(loss):
            found = first_not_finite(kwargs["model"])
            raise FloatingPointError(
                f"the training loss of step {state.global_step} is {loss}: lower "
                f"learning_rate={self._learning_rate} or alpha" + (f". Not finite: {found}" if found else "")
            )


def warn_unless_learned(state: TrainerState, learning_rate: float) -> None:
    """Says so where the last tenth of the losses is no lower than the first; too few steps say nothing.

    A rate that is too high need not end in NaN: the loss goes up and comes back to that of guessing.
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
