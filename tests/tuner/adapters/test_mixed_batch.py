"""One adapter for each sample of a batch: as if each sample had been computed alone with its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from randlora import AdapterNamesError, RandLoraConfig, get_peft_model

from ..helpers import (
    LLAMA_TARGETS,
    STACK_TARGETS,
    assert_close,
    bert,
    conv_stack,
    features,
    layers_of,
    llama,
    randomise,
    stack,
    tokens,
)

BASE = "__base__"
SECOND = {"r": 3, "randlora_alpha": 6, "projection_prng_key": 5, "sparse": True}


def adapted(build=stack, first=STACK_TARGETS, second=("tall", "wide"), **config):
    """Adapters x and y, of other ranks, keys, densities and targets."""
    model = get_peft_model(build(), RandLoraConfig(r=4, randlora_alpha=8, target_modules=first, **config), "x")
    model.add_adapter("y", RandLoraConfig(target_modules=list(second), **SECOND))
    for name in "xy":
        randomise(model, name, seed=ord(name))
    return model.eval()


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.stack = torch.nn.Linear(6, 6), torch.nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x):
        return torch.einsum("bi,eoi->bo", self.gate(x), self.stack)


def alone(model, name, batch, call=lambda model, batch: model(batch)):
    """The output for a batch of one, with one adapter or none."""
    if name == BASE:
        with model.disable_adapter():
            return call(model, batch)
    active = model.active_adapter
    model.set_adapter(name)
    found = call(model, batch)
    model.set_adapter(active)
    return found


@given(st.lists(st.sampled_from(["x", "y", BASE]), min_size=1, max_size=8), st.sampled_from([stack, conv_stack]))
def test_each_sample_has_its_own_adapter(names, build):
    model = adapted(build)
    batch = features(batch=(len(names),))
    mixed = model(batch, adapter_names=names)
    for row, name in enumerate(names):
        assert_close(mixed[row : row + 1].detach(), alone(model, name, batch[row : row + 1]).detach(), 1e-6, name)


def test_sequences_of_a_language_model():
    model = adapted(llama, LLAMA_TARGETS, ["q_proj", "down_proj"])
    names, batch = ["y", BASE, "x", "y"], tokens(batch=4)
    mixed = model(input_ids=batch, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = alone(model, name, batch[row : row + 1], lambda m, b: m(input_ids=b).logits)
        assert_close(mixed[row : row + 1].detach(), expected.detach(), 1e-5, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    model = adapted().to(dtype)
    batch = features(dtype, batch=(3,))
    mixed = model(batch, adapter_names=["x", BASE, "y"])
    assert mixed.dtype == dtype
    for row, name in enumerate(["x", BASE, "y"]):
        expected = alone(model, name, batch[row : row + 1])
        assert_close(mixed[row : row + 1].detach(), expected.detach(), 5e-2 if dtype.itemsize == 2 else 1e-6, name)


def test_nothing_is_left_behind():
    model = adapted()
    model.set_adapter("y")
    batch = features(batch=(2,))
    before = model(batch)
    model(batch, adapter_names=["x", BASE])
    assert all(layer.active_adapters == ["y"] for layer in layers_of(model).values())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(batch), before)


def test_nothing_is_left_behind_by_an_error():
    model = adapted()
    batch = features(batch=(2,))
    before = model(batch)
    with pytest.raises(AdapterNamesError):
        model(batch, adapter_names=["x"])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(batch), before)


@pytest.mark.parametrize("active", ["x", "y"])
def test_modules_to_save_follow_whichever_adapter_is_active(active):
    """PEFT's LoRA computes the base model's head for all rows while an adapter without its own is active."""
    model = adapted(modules_to_save=["head"])
    model.base_model.model.head.modules_to_save["x"].bias.data.fill_(3.0)
    model.set_adapter(active)
    names, batch = ["x", "y", BASE], features(batch=(3,))
    mixed = model(batch, adapter_names=names)
    for row, name in enumerate(names):
        assert_close(mixed[row : row + 1].detach(), alone(model, name, batch[row : row + 1]).detach(), 1e-6, name)


def test_task_models():
    model = adapted(bert, ["query", "value"], ["key", "query"], task_type="SEQ_CLS")
    names, batch = ["x", "y", BASE], tokens()
    mixed = model(input_ids=batch, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = alone(model, name, batch[row : row + 1], lambda m, b: m(input_ids=b).logits)
        assert_close(mixed[row : row + 1].detach(), expected.detach(), 1e-5, name)


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "two of three beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams by config": {"generation_config": GenerationConfig(num_beams=2, pad_token_id=0, max_new_tokens=5)},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
class TestGenerate:
    def test_a_decoder(self, options):
        model = adapted(llama, LLAMA_TARGETS, ["q_proj", "down_proj"], task_type="CAUSAL_LM")
        self._check(model, {"pad_token_id": 0, "max_new_tokens": 5, "eos_token_id": None, **options})

    def test_an_encoder_and_a_decoder(self, options):
        def t5():
            torch.manual_seed(1)
            sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2}
            return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))

        model = adapted(t5, ["q", "v", "wi", "wo"], ["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
        self._check(model, {"max_new_tokens": 5, "eos_token_id": None, **options})

    def _check(self, model, options):
        def generate(model, batch, **more):
            return model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), **options, **more)

        names, batch = ["y", BASE, "x"], tokens(count=4, batch=3) + 1
        mixed = generate(model, batch, adapter_names=names)
        expected = [alone(model, name, batch[row : row + 1], generate) for row, name in enumerate(names)]
        assert len({tuple(part.flatten().tolist()) for part in expected}) > 1, "the adapters must differ"
        assert torch.equal(mixed, torch.cat(expected))


class TestRefused:
    def test_training_mode(self):
        with pytest.raises(AdapterNamesError, match=r"model.eval\(\)"):
            adapted().train()(features(), adapter_names=["x"] * 6)

    def test_unknown_names(self):
        with pytest.raises(AdapterNamesError, match=r"'z'.*'x', 'y'"):
            adapted()(features(), adapter_names=["x", "z"] * 3)

    def test_one_string(self):
        with pytest.raises(AdapterNamesError, match="'x' must be a list"):
            adapted()(features(), adapter_names="x")

    @pytest.mark.parametrize("count", [0, 5, 7, 12])
    def test_another_number_of_names(self, count):
        with pytest.raises(AdapterNamesError, match=f"{count} names for 6 inputs"):
            adapted()(features(), adapter_names=["x"] * count)

    def test_merged_adapters(self):
        model = adapted()
        model.merge_adapter()
        with pytest.raises(AdapterNamesError, match="unmerge_adapter"):
            model(features(), adapter_names=["x"] * 6)

    def test_they_are_value_errors_as_those_of_peft(self):
        assert issubclass(AdapterNamesError, ValueError)


def test_disabled_adapters_leave_the_base_model():
    model = adapted()
    with model.disable_adapter():
        assert torch.equal(model(features(), adapter_names=["x"] * 6), stack()(features()))


class TestOtherKindsOfLayer:
    @pytest.mark.parametrize(
        ("base", "batch"),
        [
            (lambda: torch.nn.Conv2d(3, 8, 3), torch.linspace(-1, 1, 3 * 3 * 25).reshape(3, 3, 5, 5)),
            (lambda: torch.nn.Embedding(20, 8), torch.arange(12).reshape(3, 4)),
        ],
        ids=["Conv2d", "Embedding"],
    )
    def test_each_sample_has_its_own_adapter(self, base, batch):
        torch.manual_seed(0)
        model = adapted(lambda: torch.nn.Sequential(base()), ["0"], ["0"])
        names = ["y", BASE, "x"]
        mixed = model(batch, adapter_names=names)
        for row, name in enumerate(names):
            expected = alone(model, name, batch[row : row + 1])
            assert_close(mixed[row : row + 1].detach(), expected.detach(), 1e-6, name)
        assert not torch.equal(mixed, alone(model, BASE, batch))

    def test_one_weight_for_all_samples_is_refused(self):
        torch.manual_seed(0)
        attention = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        model = adapted(lambda: attention, ["linear1", "out_proj"], ["linear1"])
        model.add_adapter("z", RandLoraConfig(r=4, target_modules=["linear2"]))
        randomise(model, "z")
        batch = torch.randn(2, 3, 8)
        for active, names in (("y", "xz"), ("x", "yz")):  # what is active would change the rows of the others
            model.set_adapter(active)
            with pytest.raises(AdapterNamesError, match=r"'x' .* '.*self_attn\.out_proj': its module has one weight"):
                model(batch, adapter_names=list(names))
        model.set_adapter("y")
        mixed = model(batch, adapter_names=["y", "z"])
        for row, name in enumerate("yz"):
            assert_close(mixed[row : row + 1].detach(), alone(model, name, batch[row : row + 1]).detach(), 1e-6, name)

    def test_parameters_that_no_row_changes(self):
        torch.manual_seed(0)
        model = get_peft_model(torch.nn.Sequential(Experts()), RandLoraConfig(r=2, target_modules=["gate"]), "x")
        model.add_adapter("y", RandLoraConfig(r=2, target_modules=[], target_parameters=["0.stack"]))
        for name in "xy":
            randomise(model, name, seed=ord(name))
        model.eval().set_adapter("x")
        batch = torch.randn(2, 6)
        mixed = model(batch, adapter_names=["x", BASE])
        for row, name in enumerate(["x", BASE]):
            assert_close(mixed[row : row + 1].detach(), alone(model, name, batch[row : row + 1]).detach(), 1e-6, name)
        model.set_adapter("y")
        with pytest.raises(AdapterNamesError, match="'y' is named or active"):
            model(batch, adapter_names=["x", BASE])
