"""A thousand adapters on one model, ten thousand switches, and many threads."""

import gc
import threading
import tracemalloc
from typing import NamedTuple

import pytest
import torch

from randlora import RandLoraConfig, get_peft_model
from reliability.children import SLOW
from tuner.helpers import LLAMA_TARGETS, assert_close, layers_of, llama, randomise, tokens

ADAPTERS, SWITCHES = (1_000, 10_000) if SLOW else (60, 500)
OVERHEAD = 2_500
"""Bytes of Python's memory for an adapter in a layer, beside λ and γ: two parameters and their names in nine dicts."""

THREADS = 100
BASE = "__base__"
NAMES = ["a", "b", "c", BASE]


class Held(NamedTuple):
    """What the process holds at a moment.

    Attributes:
        tensors: bytes of the storages of all parameters and bases, each once.
        objects: that the garbage collector knows, of those that were made for the test.
        memory: bytes that Python has allocated.
        modules: of the model.
    """

    tensors: int
    objects: int
    memory: int
    modules: int

    def __sub__(self, before):
        return Held(*(now - then for now, then in zip(self, before, strict=True)))


def held(model):
    gc.collect()
    bases = {basis for layer in layers_of(model).values() for basis in layer.bases.values()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    nbytes = sum(storages.values()) + sum(basis.nbytes for basis in bases)
    return Held(nbytes, len(gc.get_objects()), tracemalloc.get_traced_memory()[0], len([*model.modules()]))


@pytest.fixture(scope="module")
def thousand():
    """A model with that many adapters, and what it held with 10, 20, ten less and all of them."""
    config = {"r": 4, "target_modules": LLAMA_TARGETS, "randlora_dropout": 0.1}
    gc.collect()
    gc.freeze()  # what other tests have left is not counted, so that it may go
    tracemalloc.start()
    model, found = get_peft_model(llama(num_hidden_layers=1), RandLoraConfig(**config), "0th"), {}
    for number in range(1, ADAPTERS):
        if number in (10, 20, ADAPTERS - 10):
            found[number] = held(model)
        model.add_adapter(f"{number}th", RandLoraConfig(**config))
    found[ADAPTERS] = held(model)
    yield model, found
    tracemalloc.stop()
    gc.unfreeze()


def test_an_adapter_takes_its_lambda_and_gamma_and_a_thousand_take_a_thousand_times_that(thousand):
    model, found = thousand
    layers = layers_of(model).values()
    own = sum(p["0th"].numel() * p["0th"].element_size() for x in layers for p in (x.randlora_lambda, x.randlora_gamma))
    for first, last in ((found[10], found[20]), (found[ADAPTERS - 10], found[ADAPTERS])):
        added = last - first
        assert added.tensors == 10 * own
        assert added.modules == 0
        assert added.memory <= 10 * OVERHEAD * len(layers)
    early, late = found[20] - found[10], found[ADAPTERS] - found[ADAPTERS - 10]
    assert abs(late.objects - early.objects) <= 10  # of dicts, parameters and configs alike
    assert {id(layer.bases[name]) for layer in layers for name in layer.bases} == {id(next(iter(layers)).bases["0th"])}


def test_ten_thousand_switches_leave_nothing_behind(thousand):
    model, _ = thousand

    def switch(times):
        for number in range(times):
            model.set_adapter(f"{number * 7 % ADAPTERS}th")
            if number % (SWITCHES // 10) == 0:
                assert {
                    n for x in layers_of(model).values() for n, p in x.randlora_lambda.items() if p.requires_grad
                } == {model.active_adapter}

    switch(10)  # caches fill
    before = held(model)
    switch(SWITCHES)
    added = held(model) - before
    assert added.tensors == added.modules == 0
    assert added.objects <= 20
    assert added.memory <= 2**14  # less than two bytes for each of ten thousand


def served():
    """Three adapters, of which a trains the output layer too, in evaluation mode with a active."""
    first = RandLoraConfig(r=4, target_modules=LLAMA_TARGETS, modules_to_save=["lm_head"])
    model = get_peft_model(llama(), first, "a")
    model.add_adapter("b", RandLoraConfig(r=3, target_modules=["q_proj", "down_proj"], projection_prng_key=5))
    model.add_adapter("c", RandLoraConfig(r=4, target_modules=LLAMA_TARGETS, very_sparse=True))
    for name in "abc":
        randomise(model, name, seed=ord(name))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["a"].weight.add_(0.1)
    return model.eval()


def test_a_hundred_threads_with_an_adapter_each_get_its_output():
    """By ``adapter_names``, while other threads call the model without."""
    model, batch = served(), tokens()
    expected = {}
    with torch.no_grad():
        for name in "abc":
            model.set_adapter(name)
            expected[name] = model(input_ids=batch).logits
        model.set_adapter("a")
        with model.disable_adapter():
            expected[BASE] = model(input_ids=batch).logits
    assert not torch.allclose(expected["a"], expected["b"], atol=1e-3)
    found, start = [], threading.Barrier(THREADS)

    def call(number):
        name = NAMES[number % len(NAMES)]
        options = {"adapter_names": [name] * len(batch)} if number % 5 else {}
        start.wait()
        with torch.no_grad():
            for _ in range(5):
                found.append((name if options else "a", model(input_ids=batch, **options).logits))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5 * THREADS
    for name, logits in found:
        assert_close(logits, expected[name], 1e-5, name)
    assert model.active_adapters == ["a"]
    assert not any(module._forward_pre_hooks for module in model.modules())
