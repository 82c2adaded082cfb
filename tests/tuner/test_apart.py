"""One adapter among others: adding sees no other, switching touches no other, and all are there afterwards."""

import pytest

from randlora import RandLoraConfig, get_peft_model
from randlora.tuner.apart import apart

from .helpers import STACK_TARGETS, layers_of, randomise, snapshot, stack

CONFIG = {"r": 4, "target_modules": STACK_TARGETS}


@pytest.fixture
def model():
    model = randomise(get_peft_model(stack(), RandLoraConfig(**CONFIG), adapter_name="a"), "a")
    for name in "bc":
        model.add_adapter(name, RandLoraConfig(**CONFIG))
    return model


def keys(model):
    return [list(layer.randlora_lambda) for layer in layers_of(model).values()]


def test_others_are_hidden_and_come_back_in_their_order(model):
    before, state = keys(model), snapshot(model)
    with apart(model, "b"):
        assert all(names == ["b"] for names in keys(model))
    assert keys(model) == before
    assert list(snapshot(model)) == list(state)

    with pytest.raises(KeyError), apart(model, "b"):
        layers_of(model)["nothing"]
    assert keys(model) == before


def test_what_is_added_and_removed_within_stays_so(model):
    layer = next(iter(layers_of(model).values()))
    with apart(model, "c"):
        kept = layer.randlora_lambda.pop("c")
    assert list(layer.randlora_lambda) == ["a", "b"]
    with apart(model, "c"):
        layer.randlora_lambda["c"] = kept
    assert list(layer.randlora_lambda) == ["a", "b", "c"]
    assert layer.randlora_lambda["c"] is kept


def test_only_the_active_adapter_trains(model):
    for wanted in ("c", "a", "b"):
        model.set_adapter(wanted)
        trains = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
        assert trains == {wanted}
    layer = next(iter(layers_of(model).values()))
    layer.set_requires_grad(["a"])
    layer.set_adapter("c")
    assert {n for n, p in layer.randlora_lambda.items() if p.requires_grad} == {"c"}


def test_what_was_let_train_is_frozen_by_the_next_switch_also_after_an_addition(model):
    model.set_adapter("b")
    layer = next(iter(layers_of(model).values()))
    layer.set_requires_grad("a")
    model.add_adapter("d", RandLoraConfig(**CONFIG))
    model.set_adapter("c")
    assert {n for n, p in layer.randlora_lambda.items() if p.requires_grad} == {"c"}
    assert not layer._may_train


def test_disabling_looks_at_those_that_train_and_at_no_others(model):
    model.base_model.set_requires_grad("b")
    model.base_model.disable_adapter_layers()
    assert not any(p.requires_grad for p in model.parameters())
    layer = next(iter(layers_of(model).values()))
    layer.randlora_lambda["c"].requires_grad_(True)  # by hand: found by whoever walks over all adapters
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert {n for n, p in layer.randlora_lambda.items() if p.requires_grad} == {"a", "c"}
