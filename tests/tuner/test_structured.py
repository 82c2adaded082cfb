"""Structured bases as an adapter has them: config, file, refusal by PEFT, and the tools that take any adapter."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from randlora import PeftModel, RandLoraConfig, get_peft_model, hotswap_adapter
from randlora.analysis.contents import inspect_adapter
from randlora.convert.lora import to_lora
from randlora.errors import BasisMismatchError, CheckpointError, CombinationError, ConfigError
from randlora.tuner.files.adapter_folder import read_adapter

from .helpers import LLAMA_TARGETS, STACK_TARGETS, adapted, assert_close, layers_of, llama, output, randomise, stack

STRUCTURED = {"r": 4, "randlora_alpha": 3, "structured": True, "groups": 2, "target_modules": STACK_TARGETS}
WEIGHTS = "adapter_model.safetensors"


def structured(seed=3, name="default", **changes):
    return adapted(name=name, seed=seed, **STRUCTURED | changes)


class TestConfig:
    @pytest.mark.parametrize("groups", [0, -8, 3, 12])
    def test_groups_are_a_power_of_two(self, groups):
        with pytest.raises(ConfigError, match=f"groups={groups} must be a power of two"):
            RandLoraConfig(structured=True, groups=groups)

    def test_groups_of_other_bases(self):
        with pytest.raises(ConfigError, match="groups=4 means nothing without structured=True"):
            RandLoraConfig(groups=4)

    @pytest.mark.parametrize("other", [{"sparse": True}, {"very_sparse": True}, {"sparsity": 2.0}])
    def test_two_kinds_at_once(self, other):
        with pytest.raises(ConfigError, match="contradict each other"):
            RandLoraConfig(structured=True, **other)

    def test_fewer_groups_are_said(self):
        with pytest.warns(UserWarning, match=r"of the 8 groups .* r=30 has 2, as many as divide it: r=32 has them all"):
            get_peft_model(stack(), RandLoraConfig(r=30, structured=True, target_modules=["tall"]))

    def test_a_file_that_contradicts_itself(self, tmp_path):
        structured().save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"structured": False, "groups": 8}))
        with pytest.raises(ConfigError, match="RANDLORA_STRUCTURED"):
            PeftConfig.from_pretrained(tmp_path)


class TestFile:
    def test_it_holds_lambda_and_gamma_only_and_gives_the_same(self, tmp_path):
        model = structured()
        model.save_pretrained(tmp_path)
        names = set(load_file(tmp_path / WEIGHTS))
        assert all(name.endswith(("randlora_lambda", "randlora_gamma")) for name in names)
        assert torch.equal(output(PeftModel.from_pretrained(stack(), tmp_path).eval()), output(model))

    def test_peft_itself_refuses_it(self, tmp_path):
        model = get_peft_model(llama(), RandLoraConfig(**STRUCTURED | {"target_modules": LLAMA_TARGETS}))
        model.save_pretrained(tmp_path / "adapter")
        llama().save_pretrained(tmp_path / "base")
        code = (
            "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
            "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])"
        )
        folders = [str(tmp_path / "base"), str(tmp_path / "adapter")]
        found = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False)
        assert found.returncode != 0
        assert "KeyError: 'RANDLORA_STRUCTURED'" in found.stderr

    def test_bases_in_it_are_refused(self, tmp_path):
        model = structured()
        model.save_pretrained(tmp_path)
        A, B = layers_of(model)["base_model.model.tall"].basis("default").projections()
        bases = {"base_model.randlora_A": A.float(), "base_model.randlora_B": B.float().contiguous()}
        save_file(load_file(tmp_path / WEIGHTS) | bases, tmp_path / WEIGHTS)
        with pytest.raises(CheckpointError, match="structured bases never are"):
            PeftModel.from_pretrained(stack(), tmp_path)
        with pytest.raises(CheckpointError, match="structured bases never are"):
            read_adapter(tmp_path)

    @pytest.mark.parametrize("change", [{"groups": 4}, {"projection_prng_key": 1}])
    def test_other_bases_are_an_error(self, change, tmp_path):
        structured().save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(BasisMismatchError):
            PeftModel.from_pretrained(stack(), tmp_path)

    def test_it_is_read_without_its_model(self, tmp_path):
        structured().save_pretrained(tmp_path)
        found = inspect_adapter(tmp_path)
        assert found.parameters == sum(p.numel() for p in structured().parameters() if p.requires_grad)
        assert found.bases_in_file == 0


class TestSideBySide:
    def test_beside_dense_and_of_another_number_of_groups(self):
        model = structured()
        alone = output(model)
        model.add_adapter("dense", RandLoraConfig(r=3, target_modules=STACK_TARGETS))
        model.add_adapter("finer", RandLoraConfig(**STRUCTURED | {"groups": 4}))
        randomise(model, "finer", seed=8)
        assert torch.equal(output(model), alone)
        model.set_adapter("finer")
        assert_close(output(model.eval()), output(structured(8, groups=4)), 1e-6)

    def test_a_batch_of_several(self):
        model = structured()
        model.add_adapter("finer", RandLoraConfig(**STRUCTURED | {"groups": 4}))
        randomise(model, "finer", seed=8).eval()
        x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
        found = model(x, adapter_names=["finer", "__base__", "default"])
        for row, name in enumerate(["finer", None, "default"]):
            if name is None:
                expected = stack()(x)[row]
            else:
                model.set_adapter(name)
                expected = model(x)[row]
            torch.testing.assert_close(found[row], expected)

    def test_hotswap(self, tmp_path):
        structured(seed=9).save_pretrained(tmp_path)
        model = structured()
        hotswap_adapter(model, tmp_path, "default")
        assert torch.equal(output(model), output(structured(seed=9)))

    @pytest.mark.parametrize("targets", [STACK_TARGETS, ["tall", "wide"]])
    def test_sums_of_adapters_on_any_layers(self, targets, tmp_path):
        """A layer reads the same numbers whatever the other layers are."""
        model = structured()
        model.add_adapter("other", RandLoraConfig(**STRUCTURED | {"target_modules": targets}))
        with torch.no_grad():
            for layer in layers_of(model).values():
                if "other" in layer.r:
                    layer.randlora_gamma["other"].copy_(layer.randlora_gamma["default"])
                    layer.randlora_lambda["other"].normal_()
        model.base_model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", "linear")
        for layer in layers_of(model).values():
            expected = 0.5 * layer.get_delta_weight("default")
            if "other" in layer.r:
                expected = expected + 2 * layer.get_delta_weight("other")
            assert_close(layer.get_delta_weight("sum"), expected, 1e-6)
        model.set_adapter("sum")
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        again = PeftModel.from_pretrained(stack(), tmp_path / "sum")
        assert_close(output(again.eval()), output(model.eval()), 1e-6)

    def test_sums_with_other_bases_are_refused(self):
        model = structured()
        model.add_adapter("finer", RandLoraConfig(**STRUCTURED | {"groups": 4}))
        with pytest.raises(CombinationError, match="different bases"):
            model.base_model.add_weighted_adapter(["default", "finer"], [1.0, 1.0], "sum", "linear")

    def test_as_lora_of_full_rank(self, tmp_path):
        model = structured()
        to_lora(model, energy=1.0).save(tmp_path)
        found = PeftModel.from_pretrained(stack(), tmp_path).eval()
        assert_close(output(found), output(model), 1e-4)


def test_training_moves_the_update_to_full_rank():
    model = get_peft_model(stack(), RandLoraConfig(**STRUCTURED))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    x, target = torch.randn(64, 10), torch.randn(64, 3)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    for layer in layers_of(model).values():
        update = layer.get_delta_weight("default").detach()
        assert torch.linalg.matrix_rank(update, rtol=1e-6) == min(update.shape)  # above what rounding in float32 makes
