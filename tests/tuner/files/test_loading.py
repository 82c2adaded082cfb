"""A load that fails leaves the model as it was; and the ways in which PEFT loads."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from randlora import BasisMismatchError, CheckpointError, RandLoraConfig, RandLoraError, get_peft_model

from ..helpers import (
    STACK_TARGETS,
    Stack,
    assert_same_tensors,
    layers_of,
    llama,
    output,
    randomise,
    saved,
    snapshot,
    stack,
)

WEIGHTS = "adapter_model.safetensors"


def another_fingerprint(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"basis_fingerprint": "0" * 64}))


def bases_of_another_key(folder):
    """Refused while the adapter is injected: there are no bases in the file to wait for."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"save_projection": False, "projection_prng_key": 8}))
    content = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in content.items() if "randlora_A" not in k and "randlora_B" not in k}, folder / WEIGHTS)


def half_a_basis(folder):
    content = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in content.items() if "randlora_A" not in k}, folder / WEIGHTS)


def another_shape(folder):
    content = load_file(folder / WEIGHTS)
    save_file({k: v[:-1].clone() if "lambda" in k else v for k, v in content.items()}, folder / WEIGHTS)


def truncated(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:99])


def gone(folder):
    (folder / WEIGHTS).unlink()


DAMAGE = [another_fingerprint, bases_of_another_key, half_a_basis, another_shape, truncated, gone]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
class TestFailures:
    def test_of_from_pretrained_leave_the_base_model(self, damage, tmp_path):
        saved(tmp_path, modules_to_save=["head"])
        damage(tmp_path)
        model = stack()
        model.tall.bias.requires_grad_(False)
        state, modules, attributes = snapshot(model), list(model.named_modules()), set(vars(model))
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(RandLoraError):
            PeftModel.from_pretrained(model, tmp_path)
        assert list(model.named_modules()) == modules
        assert_same_tensors(model.state_dict(), state)
        assert set(vars(model)) == attributes
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
        assert torch.equal(output(model), output(stack()))

    def test_of_load_adapter_leave_the_other_adapters(self, damage, tmp_path):
        saved(tmp_path, target_modules=["wide", "head"], projection_prng_key=3)
        damage(tmp_path)
        config = RandLoraConfig(r=3, target_modules=["tall"], modules_to_save=["square"])
        model = randomise(get_peft_model(stack(), config))
        state, modules, before = snapshot(model), [type(m) for m in model.modules()], output(model)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(RandLoraError):
            model.load_adapter(tmp_path, "second")
        assert [type(m) for m in model.modules()] == modules
        assert_same_tensors(model.state_dict(), state)
        assert list(model.peft_config) == ["default"]
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
        assert torch.equal(output(model), before)

    def test_of_loading_into_an_adapter_that_is_there_leave_it(self, damage, tmp_path):
        saved(tmp_path, projection_prng_key=3, save_projection=True)
        damage(tmp_path)
        model = randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS)))
        if damage is another_fingerprint:
            model.peft_config["default"].basis_fingerprint = "0" * 64
        before = output(model)
        with pytest.raises(RandLoraError):
            model.load_adapter(tmp_path, "default")
        assert torch.equal(output(model), before)
        assert list(model.peft_config) == ["default"]

    def test_can_be_tried_again(self, damage, tmp_path):
        expected = output(saved(tmp_path / "good"))
        saved(tmp_path / "bad")
        damage(tmp_path / "bad")
        model = stack()
        with pytest.raises(RandLoraError):
            PeftModel.from_pretrained(model, tmp_path / "bad")
        assert torch.equal(output(PeftModel.from_pretrained(model, tmp_path / "good")), expected)


def test_the_errors_are_those_that_were_raised(tmp_path):
    saved(tmp_path / "one")
    another_fingerprint(tmp_path / "one")
    saved(tmp_path / "two", target_modules=["tall"])
    half_a_basis(tmp_path / "two")
    with pytest.raises(BasisMismatchError, match="0" * 64):
        PeftModel.from_pretrained(stack(), tmp_path / "one")
    with pytest.raises(CheckpointError, match="only randlora_B"):
        PeftModel.from_pretrained(stack(), tmp_path / "two")


def test_other_methods_are_none_of_our_business(tmp_path):
    get_peft_model(stack(), LoraConfig(target_modules=["tall"])).save_pretrained(tmp_path)
    truncated(tmp_path)
    model = stack()
    with pytest.raises(Exception):  # noqa: B017, PT011
        PeftModel.from_pretrained(model, tmp_path)
    assert type(model.tall).__module__.startswith("peft.tuners.lora")


class TestOptions:
    @pytest.mark.parametrize("save_projection", [True, False])
    def test_low_cpu_mem_usage(self, tmp_path, save_projection):
        model = saved(tmp_path, save_projection=save_projection)
        loaded = PeftModel.from_pretrained(stack(), tmp_path, low_cpu_mem_usage=True)
        assert not any(p.is_meta for p in loaded.parameters())
        assert torch.equal(output(loaded), output(model))
        loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
        loaded.set_adapter("second")
        assert torch.equal(output(loaded), output(model))

    def test_torch_device(self, tmp_path):
        model = saved(tmp_path)
        loaded = PeftModel.from_pretrained(stack(), tmp_path, torch_device="cpu")
        assert {p.device.type for p in loaded.parameters()} == {"cpu"}
        assert torch.equal(output(loaded), output(model))

    @pytest.mark.parametrize(("autocast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
    def test_autocast_adapter_dtype(self, tmp_path, autocast, expected):
        saved(tmp_path)
        loaded = PeftModel.from_pretrained(stack().bfloat16(), tmp_path, autocast_adapter_dtype=autocast)
        assert {layer.randlora_lambda["default"].dtype for layer in layers_of(loaded).values()} == {expected}
        loaded.load_adapter(tmp_path, "second", autocast_adapter_dtype=autocast)
        assert {layer.randlora_gamma["second"].dtype for layer in layers_of(loaded).values()} == {expected}
        assert output(loaded, torch.bfloat16).isfinite().all()

    @pytest.mark.parametrize("trainable", [True, False])
    def test_is_trainable(self, tmp_path, trainable):
        saved(tmp_path)
        loaded = PeftModel.from_pretrained(stack(), tmp_path, is_trainable=trainable)
        assert any(p.requires_grad for p in loaded.parameters()) == trainable
        assert loaded.training == trainable

    def test_auto_classes(self, tmp_path):
        llama().save_pretrained(tmp_path / "base")
        base = type(llama()).from_pretrained(tmp_path / "base")
        model = randomise(get_peft_model(base, RandLoraConfig(r=4, task_type="CAUSAL_LM"))).eval()
        model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(output(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), output(model))

    def test_selected_adapters(self, tmp_path):
        model = saved(tmp_path / "both")
        model.add_adapter("second", RandLoraConfig(r=3, target_modules=["tall"]))
        model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
        assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["README.md", "second"]

    def test_a_config_that_is_given(self, tmp_path):
        model = saved(tmp_path)
        config = RandLoraConfig.from_pretrained(tmp_path)
        config.randlora_alpha = 16
        loaded = PeftModel.from_pretrained(stack(), tmp_path, config=config)
        assert type(loaded.get_base_model()) is Stack
        for name, layer in layers_of(loaded).items():
            assert layer.scaling["default"] == 2 * layers_of(model)[name].scaling["default"]
