"""Which jobs are computed together, by a model that counts."""

import threading
from concurrent.futures import CancelledError
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from randlora.serve.batches import Job, Worker


class Counter:
    """Its next token is the number of tokens that it has seen in a row; it waits until it may compute."""

    device = torch.device("cpu")

    def __init__(self):
        self.batches, self.may, self.fails = [], threading.Event(), False

    @contextmanager
    def rows(self, keys):
        self.may.wait(60)
        self.keys = list(keys)
        yield self

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria, tokenizer=None):
        self.batches.append(SimpleNamespace(keys=self.keys, ids=input_ids.tolist(), mask=attention_mask.tolist()))
        if self.fails:
            raise RuntimeError("no memory")
        seen = attention_mask.sum(1)
        for _ in range(generation_config.max_new_tokens):
            input_ids = torch.cat([input_ids, seen[:, None]], dim=1)
            seen = seen + 1
            if stopping_criteria(input_ids, None).all():
                break


@pytest.fixture
def model():
    return Counter()


@pytest.fixture
def worker(model):
    return Worker(model.rows, most=3, pad=9)


def job(key="a", length=2, put=lambda token: True, seed=None, **config):
    return Job(key, [1] * length, GenerationConfig(**{"max_new_tokens": 3, **config}), put, seed=seed)


def held_up(worker):
    """A job that the worker waits in, so that the following ones queue."""
    first = job("first", seed=0)
    worker.submit(first)
    while worker._waiting:
        pass
    return first


def results(model, *jobs):
    model.may.set()
    return [one.future.result(60) for one in jobs]


def test_what_waits_is_one_batch_with_shorter_prompts_padded(model, worker):
    held_up(worker)
    jobs = [job("a", 2), job("b", 4, max_new_tokens=5), job("a", 3, max_new_tokens=1)]
    for one in jobs:
        worker.submit(one)
    assert results(model, *jobs) == [[2, 3, 4], [4, 5, 6, 7, 8], [3]]
    batch = model.batches[1]
    assert batch.keys == ["a", "b", "a"]
    assert batch.ids == [[9, 9, 1, 1], [1, 1, 1, 1], [9, 1, 1, 1]]
    assert batch.mask == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize(
    "alone",
    [{"seed": 1}, {"repetition_penalty": 1.5}, {"stop_strings": ["x"]}, {"do_sample": True, "temperature": 0.5}],
)
def test_what_sees_more_than_its_next_token_or_is_asked_otherwise_has_a_batch_of_its_own(model, worker, alone):
    held_up(worker)
    jobs = [job("a"), job("b", **alone), job("c")]
    for one in jobs:
        worker.submit(one)
    assert results(model, *jobs) == [[2, 3, 4]] * 3
    assert [batch.keys for batch in model.batches] == [["first"], ["a", "c"], ["b"]]


def test_settings_that_say_nothing_of_the_text_do_not_part_a_batch(model, worker):
    held_up(worker)
    of_a_model = {"output_attentions": False, "output_hidden_states": False, "repetition_penalty": 1.0}
    jobs = [job("a", **of_a_model), job("b")]
    for one in jobs:
        worker.submit(one)
    results(model, *jobs)
    assert model.batches[1].keys == ["a", "b"]


def test_no_batch_has_more_than_its_most(model, worker):
    held_up(worker)
    jobs = [job(str(number)) for number in range(5)]
    for one in jobs:
        worker.submit(one)
    results(model, *jobs)
    assert [batch.keys for batch in model.batches[1:]] == [["0", "1", "2"], ["3", "4"]]


def test_a_model_that_reads_padding_gets_prompts_of_one_length(model):
    worker = Worker(model.rows, most=3, pad=9, pads=False)
    held_up(worker)
    jobs = [job("a", 2), job("b", 3), job("c", 2)]
    for one in jobs:
        worker.submit(one)
    results(model, *jobs)
    assert [batch.keys for batch in model.batches[1:]] == [["a", "c"], ["b"]]


def test_a_task_has_the_model_for_itself_and_keeps_its_place(model, worker):
    held_up(worker)
    before, after = job("a"), job("a")
    worker.submit(before)
    task = worker.run(lambda: len(model.batches))
    worker.submit(after)
    results(model, before, after)
    assert task.result(60) == 2
    assert len(model.batches) == 3
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 // 0).result(60)
    assert worker.run(lambda: "on").result(60) == "on"


def test_a_row_ends_with_its_end_token_and_when_nobody_listens(model, worker):
    held_up(worker)
    heard = []
    jobs = [
        job("a", 2, eos_token_id=[3], max_new_tokens=9),
        job("b", 7, eos_token_id=[3], max_new_tokens=9, put=lambda token: heard.append(token) or token < 8),
    ]
    for one in jobs:
        worker.submit(one)
    assert results(model, *jobs) == [[2, 3], [7, 8]]
    assert heard == [7, 8]


def test_a_row_that_fails_fails_alone_and_a_batch_that_fails_is_not_the_last(model, worker):
    held_up(worker)
    jobs = [job("a"), job("b", put=lambda token: 1 // 0)]
    for one in jobs:
        worker.submit(one)
    model.may.set()
    assert jobs[0].future.result(60) == [2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        jobs[1].future.result(60)
    model.fails = True
    worker.submit(failing := job("a"))
    with pytest.raises(RuntimeError, match="no memory"):
        failing.future.result(60)
    model.fails = False
    worker.submit(following := job("a"))
    assert following.future.result(60) == [2, 3, 4]


def test_what_was_given_up_while_it_waited_is_not_computed(model, worker):
    held_up(worker)
    given_up, wanted = job("a"), job("b")
    for one in (given_up, wanted):
        worker.submit(one)
    assert given_up.future.cancel()
    assert results(model, wanted) == [[2, 3, 4]]
    assert model.batches[1].keys == ["b"]
    with pytest.raises(CancelledError):
        given_up.future.result(1)
