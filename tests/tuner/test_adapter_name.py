"""Names that adapters may have, and those that torch or PEFT would stumble over."""

import pytest

from randlora import ConfigError, PeftModel, RandLoraConfig, get_peft_model

from .helpers import LLAMA_TARGETS, assert_same_tensors, layers_of, llama, randomise, snapshot

CONFIG = {"r": 4, "target_modules": LLAMA_TARGETS}

FAULTS = {
    "": "empty",
    "v1.5": "dot",
    "..": "dot",
    "/tmp/x": "absolute path",
    "__base__": "no adapter",
    "half": "attribute",
    "train": "attribute",
    "parameters": "attribute",
    "keys": "attribute",
    "popitem": "attribute",
    "0": r"part of the name of 'model\.layers\.0'",
    "q_proj": "part of the name",
    "weight": "part of the name",
    "base_layer": "adaptation adds",
    "randlora_lambda": "adaptation adds",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_name_that_cannot_be_is_refused_before_anything_is_done(name, tmp_path):
    plain = llama()
    before = snapshot(plain)
    with pytest.raises(ConfigError, match=FAULTS[name]):
        get_peft_model(plain, RandLoraConfig(**CONFIG), adapter_name=name)
    assert not layers_of(plain)
    assert_same_tensors(snapshot(plain), before)

    model = get_peft_model(plain, RandLoraConfig(**CONFIG), adapter_name="good")
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    for add in (
        lambda: model.add_adapter(name, RandLoraConfig(**CONFIG)),
        lambda: model.load_adapter(tmp_path / "good", name),
        lambda: model.base_model.add_weighted_adapter(["good"], [1.0], name),
    ):
        with pytest.raises(ConfigError, match="choose another"):
            add()
        assert list(model.peft_config) == ["good"]
        assert_same_tensors(snapshot(model), before)


@pytest.mark.parametrize("name", ["org/adapter", "v1_5", "Über-Ich", "a b", "lambda", "r", "q", "7", "default"])
def test_any_other_name_comes_back_from_its_file_beside_others(name, tmp_path):
    model = randomise(get_peft_model(llama(), RandLoraConfig(**CONFIG), adapter_name="good"), "good")
    model.add_adapter(name, RandLoraConfig(**CONFIG))
    randomise(model, name, seed=5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), str(tmp_path / "good"), adapter_name="good")
    again.load_adapter(str(tmp_path / name) if name != "default" else str(tmp_path), name)
    assert_same_tensors(snapshot(again), snapshot(model))
