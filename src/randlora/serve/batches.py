"""The one thread that works with the model: generation in batches, and tasks that need the model alone.

Requests that wait while a batch is computed form the next batch, even if their adapters differ. The oldest request
or task is always next. Younger requests may join the oldest one's batch, but none overtakes a task. A task that changes
the model, such as loading an adapter, never runs during a batch.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

_OF_ONE_TOKEN = {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_new_tokens"}
_OF_ONE_TOKEN |= {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "max_length"}
"""Settings that depend on the next token only. Others depend on the whole row, and so on its padding in a batch."""
_OF_NO_TEXT = {"transformers_version", "_from_model_config", "max_new_tokens", "return_dict_in_generate"}
_OF_NO_TEXT |= {"output_attentions", "output_hidden_states", "output_logits", "output_scores"}
"""Settings in which the requests of one batch may differ."""


@dataclass(eq=False)
class Job:
    """A prompt whose continuation is to be generated.

    Attributes:
        key: name of the adapter in the model, or ``"__base__"``.
        ids: tokens of the prompt.
        config: settings of the generation, with ``max_new_tokens``.
        put: called with each new token; returns whether the client still listens.
        tokenizer: tokenizer for stop strings.
        seed: seed of the sampling; by default a new one each time.
        future: future of the list of new tokens, the end token included.
        tokens: new tokens so far.
    """

    key: str
    ids: list[int]
    config: GenerationConfig
    put: Callable[[int], bool]
    tokenizer: Any = None
    seed: int | None = None
    future: Future[list[int]] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        known = self.config.eos_token_id
        self._ends = {known} if isinstance(known, int) else set(known or ())
        settings = {name: value for name, value in self.config.to_diff_dict().items() if name not in _OF_NO_TEXT}
        if settings.get("repetition_penalty") == 1:  # the value 1 means no penalty
            del settings["repetition_penalty"]
        self._alone = self.seed is not None or not settings.keys() <= _OF_ONE_TOKEN
        self._settings = json.dumps(settings, sort_keys=True, default=str)

    def joins(self, other: Job) -> bool:
        """Return whether one batch can compute both jobs."""
        return not (self._alone or other._alone) and self._settings == other._settings

    def take(self, token: int) -> None:
        """Take a new token, and end the job if the token is its last."""
        self.tokens.append(token)
        try:
            heard = self.put(token)
        except Exception as error:  # the other jobs of the batch go on
            self.future.set_exception(error)
            return
        if not heard or token in self._ends or len(self.tokens) >= (self.config.max_new_tokens or 0):
            self.future.set_result(self.tokens)


class Worker:
    """A thread that computes jobs and tasks, and ends with the process."""

    def __init__(
        self, rows: Callable[[Sequence[str]], AbstractContextManager[Any]], most: int, pad: int, pads: bool = True
    ) -> None:
        """Start the thread.

        Args:
            rows: function from the adapters' keys of a batch to a context with the model, as :meth:`Adapters.rows`.
            most: most jobs in a batch.
            pad: token that pads shorter prompts on the left; the attention mask hides it from the model.
            pads: whether the model honours that mask. If not, a batch has prompts of one length.
        """
        self._rows, self._most, self._pad, self._pads = rows, most, pad, pads
        self._waiting: deque[Job | _Task] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="model", daemon=True).start()

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._add(job)

    def run(self, task: Callable[[], Any]) -> Future[Any]:
        """Queue a call that needs the model alone, and return its future. Jobs submitted later run after the call."""
        queued = _Task(task)
        self._add(queued)
        return queued.future

    def _add(self, one: Job | _Task) -> None:
        with self._changed:
            self._waiting.append(one)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            following = self._next()
            if isinstance(following, _Task):
                following()
                continue
            jobs = [job for job in following if job.future.set_running_or_notify_cancel()]
            with _told_of_errors(jobs):
                self._generate(jobs)

    def _next(self) -> list[Job] | _Task:
        """Return the oldest task, or the oldest job with the jobs before the next task that can join its batch."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            first = self._waiting.popleft()
            if isinstance(first, _Task):
                return first
            batch = [first]
            for one in list(self._waiting):
                if isinstance(one, _Task) or len(batch) == self._most:
                    break
                if one.joins(first) and (self._pads or len(one.ids) == len(first.ids)):
                    batch.append(one)
                    self._waiting.remove(one)
            return batch

    def _generate(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        first, width = jobs[0], max(len(job.ids) for job in jobs)
        config = copy(first.config)
        config.max_new_tokens = max(job.config.max_new_tokens or 0 for job in jobs)
        if first.seed is not None:
            torch.manual_seed(first.seed)
        with torch.inference_mode(), self._rows([job.key for job in jobs]) as model:
            ids = [[self._pad] * (width - len(job.ids)) + job.ids for job in jobs]
            seen = [[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in jobs]
            model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(seen, device=model.device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_EndOfRows(jobs)]),
                **({"tokenizer": first.tokenizer} if config.stop_strings else {}),
            )
        for job in jobs:
            if not job.future.done():  # a stop string has ended the text
                job.future.set_result(job.tokens)


class _Task:
    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self.future = call, Future[Any]()

    def __call__(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._call())
        except Exception as error:
            self.future.set_exception(error)


class _EndOfRows(StoppingCriteria):
    """A stopping criterion that gives each row's new token to its job, and ends the rows whose jobs are done."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for job, token in zip(self._jobs, input_ids[:, -1].tolist(), strict=True):
            if not job.future.done():
                job.take(token)
        return torch.tensor([job.future.done() for job in self._jobs], device=input_ids.device)


@contextmanager
def _told_of_errors(jobs: Sequence[Job]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(error)
