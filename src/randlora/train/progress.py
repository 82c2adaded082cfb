"""The progress of a run: on a bar in a terminal, in lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ProgressCallback

from randlora.train.measure import device_memory_bytes, memory_bytes


class Pace:
    """Loss, tokens per second, memory and the time left.

    Args:
        state: state of the Trainer when the run begins, or goes on.
    """

    def __init__(self, state: TrainerState) -> None:
        self._start, self._steps, self._tokens = time.perf_counter(), state.global_step, state.num_input_tokens_seen

    def said(self, loss: float, state: TrainerState) -> dict[str, str]:
        """Return loss, tokens per second and memory by name, in the order of display."""
        shown = {"loss": f"{loss:.4f}"}
        if state.num_input_tokens_seen > self._tokens:
            pace = (state.num_input_tokens_seen - self._tokens) / (time.perf_counter() - self._start)
            shown["tokens/s"] = f"{pace:,.0f}"
        held = device_memory_bytes() if torch.cuda.is_available() else memory_bytes()
        return shown | {"memory": f"{held / 1e9:.2f} GB"}

    def left(self, state: TrainerState) -> str:
        """Return the time to the last step, as h:mm:ss."""
        each = (time.perf_counter() - self._start) / max(state.global_step - self._steps, 1)
        return str(timedelta(seconds=round(each * (state.max_steps - state.global_step))))


class CostOnBar(ProgressCallback):
    """The Trainer's progress bar with the time left and the run's pace, instead of a line for each step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to count, from the last step of a run that goes on."""
        super().on_train_begin(args, state, control, **kwargs)
        self._pace = Pace(state)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show a training loss on the bar, or write an evaluation above the bar."""
        if self.training_bar is None:  # only one of several processes has a bar
            return
        if "loss" in logs:
            self.training_bar.set_postfix(self._pace.said(logs["loss"], state), refresh=False)
        elif text := evaluation_text(logs, state):
            self.training_bar.write(text, file=sys.stderr)


class CostInLines(TrainerCallback):
    """The progress in lines, for a file or a pipe, where a bar would be one endless line.

    Args:
        seconds: least time from one line to the next; an evaluation and the last step always have a line.
    """

    def __init__(self, seconds: float = 15.0) -> None:
        self._seconds = seconds
        self._last = -math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to count."""
        self._pace = Pace(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line, if ``seconds`` have passed or the line is always due."""
        if state.is_world_process_zero and (text := evaluation_text(logs, state) or self._step_text(logs, state)):
            print(text, file=sys.stderr, flush=True)

    def _step_text(self, logs: Mapping[str, Any], state: TrainerState) -> str:
        now = time.monotonic()
        if "loss" not in logs or (state.global_step < state.max_steps and now - self._last < self._seconds):
            return ""
        self._last = now
        said = ", ".join(f"{name} {value}" for name, value in self._pace.said(logs["loss"], state).items())
        return f"step {state.global_step} of {state.max_steps}: {said}, {self._pace.left(state)} left"


def evaluation_text(logs: Mapping[str, Any], state: TrainerState) -> str:
    """Return an evaluation in one line; empty if ``logs`` are not of an evaluation."""
    cost = ("runtime", "_per_second", "_time")
    found = [
        f"{name.removeprefix('eval_')} {value:.4f}"
        for name, value in logs.items()
        if name.startswith("eval_") and not name.endswith(cost)
    ]
    return f"step {state.global_step}, evaluation: {', '.join(found)}" if found else ""
