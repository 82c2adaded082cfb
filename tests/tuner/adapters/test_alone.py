"""One adapter among others: adding sees no other, switching touches no other, and all are there afterwards."""

import peft
import pytest
import torch

from randlora import PeftModel, RandLoraConfig, get_peft_model
from randlora.tuner.adapters.alone import alone, without_others

from ..helpers import STACK_TARGETS, assert_same_tensors, layers_of, randomise, snapshot, stack

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
    with alone(model, "b"):
        assert all(names == ["b"] for names in keys(model))
    assert keys(model) == before
    assert list(snapshot(model)) == list(state)

    with pytest.raises(KeyError), alone(model, "b"):
        layers_of(model)["nothing"]
    assert keys(model) == before


def test_what_is_added_and_removed_within_stays_so(model):
    layer = next(iter(layers_of(model).values()))
    with alone(model, "c"):
        kept = layer.randlora_lambda.pop("c")
    assert list(layer.randlora_lambda) == ["a", "b"]
    with alone(model, "c"):
        layer.randlora_lambda["c"] = kept
    assert list(layer.randlora_lambda) == ["a", "b", "c"]
    assert layer.randlora_lambda["c"] is kept


def test_what_is_saved_of_one_adapter_is_that_of_a_model_with_no_other(model, tmp_path, monkeypatch):
    seen = []
    gather = peft.utils.save_and_load._filter_state_dict_for_adapter_name
    monkeypatch.setattr(
        peft.utils.save_and_load,
        "_filter_state_dict_for_adapter_name",
        lambda tensors, names: seen.extend(tensors) or gather(tensors, names),
    )
    for name, state_dict in (("a", None), ("b", None), ("c", model.state_dict())):
        model.save_pretrained(tmp_path, selected_adapters=[name], state_dict=state_dict)
        assert {key.rpartition(".")[2] for key in seen if "randlora_" in key} == {name}
        seen.clear()
    assert keys(model)[0] == ["a", "b", "c"]
    alone = PeftModel.from_pretrained(stack(), str(tmp_path / "a"), adapter_name="a")
    assert_same_tensors(alone.state_dict(), without_others(model.state_dict(), "a"))


def test_loading_sees_no_other_adapter(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    seen = []
    load = type(model).load_state_dict

    def watched(self, *args, **kwargs):
        seen.extend(keys(self))
        return load(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "load_state_dict", watched)
    for _ in range(2):  # the second time into the adapter that is there
        model.load_adapter(tmp_path / "a", "d")
        assert seen == [["d"]] * 3
        seen.clear()
    assert keys(model) == [["a", "b", "c", "d"]] * 3
    for layer in layers_of(model).values():
        assert torch.equal(layer.randlora_lambda["d"], layer.randlora_lambda["a"])


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
