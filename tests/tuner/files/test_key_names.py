"""An adapter's file is the same whatever other adapters the model has, or has had."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from randlora import RandLoraConfig, get_peft_model, hotswap_adapter

from ..helpers import assert_close, output, randomise, stack
from ..layers.test_attention import encoder, x

FILE = "adapter_model.safetensors"
INSIDE = {"r": 3, "target_modules": ["out_proj", "linear2"]}
AROUND = {"r": 4, "target_modules": ["linear1"], "target_parameters": ["self_attn.in_proj_weight"]}


def alone(base, config):
    return randomise(get_peft_model(base, RandLoraConfig(**config), "u"), "u").eval()


def beside(base, config, other, when):
    """The adapter u in a model that has, or has had, another."""
    configs = {"u": RandLoraConfig(**config), "v": RandLoraConfig(**other)}
    first, second = "vu" if when == "before" else "uv"
    model = get_peft_model(base, configs[first], first)
    model.add_adapter(second, configs[second])
    model.set_adapter("u")
    if when == "deleted":
        model.delete_adapter("v")
    return randomise(model, "u").eval()


def shapes(model, folder):
    """What is in the file of the adapter u."""
    model.save_pretrained(folder, selected_adapters=["u"])
    return {name: value.shape for name, value in load_file(folder / "u" / FILE).items()}


@pytest.mark.parametrize("when", ["before", "after", "deleted"])
class TestSaved:
    @pytest.mark.parametrize("bias", ["all", "randlora_only"])
    def test_biases_of_what_another_adapts(self, when, bias, tmp_path):
        config = {"r": 4, "target_modules": ["tall"], "bias": bias}
        model = beside(stack(), config, {"r": 4, "target_modules": ["wide"]}, when)
        assert shapes(model, tmp_path) == shapes(alone(stack(), config), tmp_path / "alone")
        assert torch.equal(output(PeftModel.from_pretrained(stack(), tmp_path / "u").eval()), output(model))

    @pytest.mark.parametrize("inside", ["u", "v"])
    def test_inside_of_what_another_adapts(self, when, inside, tmp_path):
        config, other = (INSIDE, AROUND) if inside == "u" else (AROUND, INSIDE)
        model = beside(encoder(), config, other, when)
        assert shapes(model, tmp_path) == shapes(alone(encoder(), config), tmp_path / "alone")
        again = PeftModel.from_pretrained(encoder(), tmp_path / "u").eval()
        assert_close(again(x()).detach(), model(x()).detach(), 1e-5)


class TestLoaded:
    """The file of an adapter that was alone, in a model in which another is around it."""

    @pytest.fixture
    def saved(self, tmp_path):
        model = alone(encoder(), INSIDE)
        model.save_pretrained(tmp_path)
        return tmp_path / "u", model(x()).detach()

    def test_beside_another(self, saved):
        folder, expected = saved
        model = alone(encoder(), AROUND)
        model.load_adapter(folder, "w")
        model.set_adapter("w")
        assert_close(model.eval()(x()).detach(), expected, 1e-6)

    def test_in_the_place_of_one_that_is_inside(self, saved):
        folder, expected = saved
        model = beside(encoder(), INSIDE, AROUND, "after")
        randomise(model, "u", seed=9)
        hotswap_adapter(model, str(folder), "u")
        assert_close(model(x()).detach(), expected, 1e-6)
