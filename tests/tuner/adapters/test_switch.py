"""Switching adapters leaves the model as PEFT's own switch would, in one walk over its modules."""

import copy

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.tuners_utils import set_adapter as their_set_adapter
from peft.utils.other import AuxiliaryTrainingWrapper

from randlora import RandLoraConfig, RandLoraLayer, get_peft_model
from randlora.tuner.adapters.switch import switch

from ..helpers import layers_of, llama, randomise, stack

TARGETS = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def model():
    model = get_peft_model(llama(), RandLoraConfig(**TARGETS, modules_to_save=["lm_head"]), adapter_name="head")
    model.add_adapter("plain", RandLoraConfig(**TARGETS))
    model.add_adapter("tokens", RandLoraConfig(**TARGETS, trainable_token_indices=[1, 5]))
    model.add_adapter("both", RandLoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]))
    return model.base_model


def state(model):
    active = {
        name: list(module.active_adapters)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    return active, {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "names", ["plain", "head", "tokens", ["plain", "both"], ["tokens", "head"], ["tokens", "plain"]]
)
def test_as_peft_does(model, names, inference):
    reference = copy.deepcopy(model)
    their_set_adapter(reference.model, names, inference_mode=inference, layer_cls=RandLoraLayer)
    model.set_adapter(names, inference_mode=inference)
    assert state(model) == state(reference)
    assert model.active_adapter == names
    assert bool(state(model)[1]) is not inference


@pytest.mark.parametrize(("names", "message"), [(["head", "both"], "Only one adapter"), ([], "at least one adapter")])
def test_refused_as_a_whole(model, names, message):
    model.set_adapter("tokens")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        model.set_adapter(names)
    assert state(model) == before
    assert model.active_adapter == "tokens"


def test_what_is_merged_is_unmerged_with_a_warning(model):
    originals = {name: layer.get_base_layer().weight.clone() for name, layer in layers_of(model).items()}
    randomise(model, "head")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("plain")
    for name, layer in layers_of(model).items():
        assert not layer.merged
        assert torch.equal(layer.get_base_layer().weight, originals[name])


def test_a_module_at_two_places_is_switched_once(monkeypatch):
    model = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=["square"]), adapter_name="a").base_model
    model.model.twice = model.model.square
    model.model.register_module("nothing", None)
    seen = []
    monkeypatch.setattr(RandLoraLayer, "set_adapter", lambda self, names, inference_mode: seen.append(self))
    switch(model, "a")
    assert seen == [model.model.square]
