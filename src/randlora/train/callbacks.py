"""What happens at each logged step: the progress bar, and an end to runs that have diverged."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback


class LossOnBar(ProgressCallback):
    """The Trainer's progress bar with the loss on it, in place of a line of output for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows a training loss on the bar; prints evaluations and summaries as the Trainer does."""
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        else:
            super().on_log(args, state, control, logs=logs, **kwargs)


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
