"""An adapter from a file in the place of another, in the same tensors."""

import copy
import json

import peft.utils.hotswap
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

from randlora import (
    BasisMismatchError,
    HotswapError,
    PeftModel,
    RandLoraConfig,
    get_peft_model,
    hotswap_adapter,
)

from ..helpers import STACK_TARGETS, assert_same_tensors, layers_of, output, randomise, saved, snapshot, stack

FIRST = {"r": 4, "randlora_alpha": 8, "target_modules": STACK_TARGETS}
WEIGHTS = "adapter_model.safetensors"


def loaded(tmp_path):
    saved(tmp_path / "first", seed=1)
    return PeftModel.from_pretrained(stack(), tmp_path / "first")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"randlora_alpha": 3, "alpha_pattern": {"wide": 5}},
        {"projection_prng_key": 9},
        {"sparse": True, "save_projection": False},
        {"randlora_scaling": "paper"},
    ],
    ids=str,
)
class TestEveryAdapterOfTheSameRank:
    def test_computes_as_if_it_had_been_loaded(self, config, tmp_path):
        model, expected = loaded(tmp_path), output(saved(tmp_path / "new", **config))
        before = output(model)
        tensors = [(p, p.data_ptr()) for p in model.parameters()]
        hotswap_adapter(model, tmp_path / "new", "default")
        assert not torch.equal(output(model), before)
        torch.testing.assert_close(output(model), expected)
        assert all(
            p is q and p.data_ptr() == pointer for (p, pointer), q in zip(tensors, model.parameters(), strict=True)
        )

    def test_can_be_saved_and_loaded(self, config, tmp_path):
        model = loaded(tmp_path)
        saved(tmp_path / "new", **config)
        hotswap_adapter(model, tmp_path / "new")
        model.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(output(PeftModel.from_pretrained(stack(), tmp_path / "again")), output(model))


def test_pefts_function_does_it_too(tmp_path):
    model, expected = loaded(tmp_path), output(saved(tmp_path / "new"))
    peft.utils.hotswap.hotswap_adapter(model, tmp_path / "new", "default", torch_device="cpu")
    assert torch.equal(output(model), expected)


def test_pefts_function_still_swaps_loras(tmp_path):
    config = LoraConfig(r=2, target_modules=["tall"], init_lora_weights=False)
    other = get_peft_model(stack(), config).eval()
    other.save_pretrained(tmp_path)
    model = get_peft_model(stack(), config).eval()
    torch.nn.init.ones_(model.base_model.model.tall.lora_B["default"].weight)
    assert not torch.equal(output(model), output(other))
    peft.utils.hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    assert torch.equal(output(model), output(other))


def test_other_adapters_stay(tmp_path):
    model = loaded(tmp_path)
    model.add_adapter("second", RandLoraConfig(r=3, target_modules=["tall"], projection_prng_key=2))
    randomise(model, "second")
    model.set_adapter("second")
    before = output(model)
    saved(tmp_path / "new", projection_prng_key=7)
    hotswap_adapter(model, tmp_path / "new", "default")
    assert torch.equal(output(model), before)


def test_a_compiled_model_is_not_compiled_again(tmp_path):
    model, expected = loaded(tmp_path), output(saved(tmp_path / "new"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    output(compiled)
    compilations = counter.frame_count
    hotswap_adapter(compiled, tmp_path / "new", "default")
    torch.testing.assert_close(output(compiled), expected)
    assert counter.frame_count == compilations > 0


class TestRefused:
    def refused(self, model, folder, match, error=HotswapError, name="default"):
        state, before, config = snapshot(model), output(model), copy.deepcopy(model.peft_config)
        scaling = {path: dict(layer.scaling) for path, layer in layers_of(model).items()}
        with pytest.raises(error, match=match):
            hotswap_adapter(model, folder, name)
        assert_same_tensors(model.state_dict(), state)
        assert torch.equal(output(model), before)
        assert model.peft_config == config
        assert {path: layer.scaling for path, layer in layers_of(model).items()} == scaling

    def test_another_rank(self, tmp_path):
        saved(tmp_path / "new", r=3)
        self.refused(loaded(tmp_path), tmp_path / "new", r"square.randlora_lambda has the shape .* needs .* the same r")

    @pytest.mark.parametrize(("old", "new"), [(["tall"], ["tall", "wide"]), (["tall", "wide"], ["tall"])], ids=str)
    def test_other_layers(self, old, new, tmp_path):
        saved(tmp_path / "new", target_modules=new)
        saved(tmp_path / "old", target_modules=old)
        model = PeftModel.from_pretrained(stack(), tmp_path / "old")
        self.refused(model, tmp_path / "new", "wide.randlora_gamma has the shape .* needs the same layers")

    @pytest.mark.parametrize("config", [{"modules_to_save": ["head"]}, {"randlora_dropout": 0.5}], ids=str)
    def test_other_modules(self, config, tmp_path):
        saved(tmp_path / "new", **config)
        self.refused(loaded(tmp_path), tmp_path / "new", f"{next(iter(config))}=.* a swap leaves the modules")

    def test_a_name_that_is_not_there(self, tmp_path):
        saved(tmp_path / "new")
        self.refused(loaded(tmp_path), tmp_path / "new", r"no RandLoRA adapter 'other' .*\['default'\]", name="other")

    def test_a_merged_adapter(self, tmp_path):
        model = loaded(tmp_path)
        saved(tmp_path / "new")
        model.merge_adapter()
        self.refused(model, tmp_path / "new", "is merged")

    def test_bases_that_are_not_those_of_the_fingerprint(self, tmp_path):
        saved(tmp_path / "new", save_projection=False, randlora_alpha=99)
        path = tmp_path / "new" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"basis_fingerprint": "0" * 64}))
        self.refused(loaded(tmp_path), tmp_path / "new", "0" * 64, BasisMismatchError)

    def test_half_a_file(self, tmp_path):
        saved(tmp_path / "new")
        content = load_file(tmp_path / "new" / WEIGHTS)
        content.pop(next(key for key in content if key.endswith("tall.randlora_gamma")))
        save_file(content, tmp_path / "new" / WEIGHTS)
        self.refused(loaded(tmp_path), tmp_path / "new", "tall.randlora_gamma has the shape .* and none in")


def test_a_peft_mixed_model_is_refused():
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(stack(), RandLoraConfig(**FIRST), mixed=True)
