"""What happens at each step: the progress bar, an end to runs that have diverged, and to those that are interrupted."""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from randlora.train.measure import device_memory_bytes, memory_bytes


class CostOnBar(ProgressCallback):
    """The Trainer's progress bar, which tells the time left, with loss, tokens per second and memory on it.

    They take the place of a line of output for each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._since = (0.0, 0)  # time, and tokens seen by then

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts to count."""
        super().on_train_begin(args, state, control, **kwargs)
        self._since = (time.perf_counter(), state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows a training loss on the bar; prints evaluations and summaries as the Trainer does."""
        if self.training_bar is None or "loss" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)
            return
        shown = {"loss": f"{logs['loss']:.4f}"}
        start, tokens = self._since
        if state.num_input_tokens_seen > tokens:
            pace = (state.num_input_tokens_seen - tokens) / (time.perf_counter() - start)
            shown["tokens/s"] = f"{pace:,.0f}"
        held = device_memory_bytes() if torch.cuda.is_available() else memory_bytes()
        self.training_bar.set_postfix(**shown, memory=f"{held / 1e9:.2f} GB", refresh=False)


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
            raise FloatingPointError(
                f"the training loss of step {state.global_step} is {loss}: lower "
                f"learning_rate={self._learning_rate} or alpha"
            )
