"""Many threads on one model."""

import threading

import torch

from randlora import RandLoraConfig, get_peft_model
from tuner.helpers import LLAMA_TARGETS, assert_close, llama, randomise, tokens

THREADS = 100
BASE = "__base__"
NAMES = ["a", "b", "c", BASE]


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
