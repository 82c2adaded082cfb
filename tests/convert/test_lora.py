"""A RandLoRA adapter as LoRA: how near, and read by a PEFT that has never heard of this package."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from torch import nn

from randlora import CombinationError, ConfigError, RandLoraConfig, get_peft_model
from randlora.convert import to_lora
from tuner.helpers import (
    LLAMA_TARGETS,
    STACK_TARGETS,
    adapted,
    assert_close,
    bert,
    conv_stack,
    gpt2,
    layers_of,
    llama,
    output,
    randomise,
    stack,
)

KINDS = {
    "linear": (stack, STACK_TARGETS),
    "conv1d": (conv_stack, STACK_TARGETS),
    "llama": (llama, LLAMA_TARGETS),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
    "bert": (bert, "all-linear"),
}


def loaded(folder, build=stack):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        model = PeftModel.from_pretrained(build(), folder).eval()
    assert type(model.base_model) is LoraModel
    return model


@pytest.mark.parametrize(("build", "targets"), KINDS.values(), ids=KINDS)
class TestWholeModels:
    def test_full_rank_loses_nothing(self, build, targets, tmp_path):
        model = adapted(build, targets, task_type="SEQ_CLS" if build is bert else None)
        conversion = to_lora(model, energy=1.0)
        conversion.save(tmp_path)
        assert max(layer.relative_error for layer in conversion.layers) < 1e-5
        assert_close(output(loaded(tmp_path, build)).detach(), output(model).detach(), 1e-4)

    def test_the_error_is_that_of_the_adapter_that_was_saved(self, build, targets, tmp_path):
        model = adapted(build, targets, task_type="SEQ_CLS" if build is bert else None)
        conversion = to_lora(model, rank=3)
        conversion.save(tmp_path)
        lora = loaded(tmp_path, build).base_model.model
        assert {layer.name for layer in conversion.layers} == set(layers_of(model.base_model.model))
        for converted in conversion.layers:
            expected = model.base_model.model.get_submodule(converted.name).get_delta_weight("default")
            found = lora.get_submodule(converted.name).get_delta_weight("default")
            error = ((found - expected).norm() / expected.norm()).item()
            assert converted.rank == 3
            assert error == pytest.approx(converted.relative_error, abs=1e-5)
            assert 0.01 < error < 1


class TestChoiceOfRank:
    @given(st.integers(1, 12))
    def test_no_lora_of_that_rank_is_nearer(self, rank):
        model = adapted()
        for converted in to_lora(model, rank=rank).layers:
            update = layers_of(model.base_model.model)[converted.name].get_delta_weight("default").detach()
            squares = torch.linalg.svdvals(update.double()).square()
            assert converted.rank == min(rank, len(squares))
            expected = math.sqrt(squares[converted.rank :].sum() / squares.sum())
            assert converted.relative_error == pytest.approx(expected, abs=1e-6)

    @given(st.floats(0.01, 1.0))
    def test_energy_is_reached_with_the_smallest_rank(self, energy):
        model = adapted()
        conversion = to_lora(model, energy=energy)
        for converted in conversion.layers:
            assert converted.relative_error**2 <= 1 - energy + 1e-9
            if converted.rank > 1:
                fewer = {layer.name: max(layer.rank - 1, 1) for layer in conversion.layers}
                less = next(layer for layer in to_lora(model, rank=fewer).layers if layer.name == converted.name)
                assert less.relative_error**2 >= 1 - energy - 1e-6

    def test_one_rank_is_that_of_smaller_layers_too(self, tmp_path):
        """Readers without `alpha_pattern` divide alpha by the rank of the layer, or of all: it must be one number."""
        model = adapted()
        conversion = to_lora(model, rank=50)
        assert len({layer.rank for layer in conversion.layers}) > 1
        conversion.save(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        largest = max(layer.rank for layer in conversion.layers)
        assert (config["r"], config["lora_alpha"]) == (largest, largest)
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        for layer in conversion.layers:
            A, B = (conversion.tensors[f"base_model.model.{layer.name}.lora_{kind}.weight"] for kind in "AB")
            assert A.shape[0] == B.shape[1] == largest
            expected = model.base_model.model.get_submodule(layer.name).get_delta_weight("default").detach()
            assert_close(B @ A, expected, 1e-5)
        assert_close(output(loaded(tmp_path)).detach(), output(model).detach(), 1e-5)

    def test_a_rank_for_each_layer(self, tmp_path):
        model = adapted()
        to_lora(model, rank={"tall": 2, "wide": 3, "square": 3}).save(tmp_path)
        lora = loaded(tmp_path)
        ranks = {name: layer.r["default"] for name, layer in lora.base_model.model.named_children() if name != "head"}
        assert ranks == {"tall": 2, "wide": 3, "square": 3}
        assert {layer.scaling["default"] for layer in lora.modules() if hasattr(layer, "scaling")} == {1.0}

    def test_names_that_end_alike_keep_their_ranks(self, tmp_path):
        def nested():
            torch.manual_seed(0)
            inner = nn.ModuleDict({"lin": nn.Linear(6, 8), "other": nn.Linear(8, 6)})
            return nn.ModuleDict({"lin": nn.Linear(6, 8), "inner": inner})

        model = adapted(nested, r"lin|inner\.other")
        to_lora(model, rank={"lin": 2, "inner.other": 5}).save(tmp_path)
        lora = loaded(tmp_path, nested).base_model.model
        assert {name: m.r["default"] for name, m in lora.named_modules() if hasattr(m, "r")} == {
            "lin": 2,
            "inner.other": 5,
        }
        model = adapted(nested, ["lin"])
        to_lora(model, rank={"lin": 2, "inner.lin": 4}).save(tmp_path / "both")
        lora = loaded(tmp_path / "both", nested).base_model.model
        assert (lora["lin"].r, lora["inner"]["lin"].r) == ({"default": 2}, {"default": 4})

    def test_an_adapter_that_was_not_trained(self):
        conversion = to_lora(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS)), energy=0.9)
        assert {layer.relative_error for layer in conversion.layers} == {0.0}


class TestWhatGoesWithIt:
    def test_modules_to_save(self, tmp_path):
        model = adapted(modules_to_save=["head"])
        model.add_adapter("other", RandLoraConfig(r=3, target_modules=["tall"], modules_to_save=["head"]))
        model.base_model.model.head.modules_to_save["default"].weight.data.fill_(0.1)
        to_lora(model, energy=1.0).save(tmp_path)
        assert_close(output(loaded(tmp_path)).detach(), output(model).detach(), 1e-5)

    def test_a_module_is_named_once(self):
        assert to_lora(adapted(modules_to_save=["head", "head"]), rank=2).config.modules_to_save == ["head"]

    @pytest.mark.parametrize("bias", ["all", "randlora_only"])
    def test_biases(self, bias, tmp_path):
        model = adapted(bias=bias)
        model.base_model.model.tall.get_base_layer().bias.data.fill_(0.3)
        if bias == "all":
            model.base_model.model.head.bias.data.fill_(0.2)
        to_lora(model, energy=1.0).save(tmp_path)
        assert_close(output(loaded(tmp_path)).detach(), output(model).detach(), 1e-5)

    def test_what_a_loader_needs_to_know(self, tmp_path):
        model = adapted(llama, ["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model.peft_config["default"].base_model_name_or_path = "some/model"
        to_lora(model, rank=2).save(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["task_type"] == "CAUSAL_LM"
        assert config["base_model_name_or_path"] == "some/model"
        assert config["target_modules"] == ["q_proj", "v_proj"]
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})
        assert config["inference_mode"] is True


class TestSums:
    def test_of_adapters_with_nothing_in_common(self, tmp_path):
        model = adapted()
        model.add_adapter("y", RandLoraConfig(r=3, target_modules=["tall", "head"], projection_prng_key=4))
        randomise(model, "y", seed=8)
        to_lora(model, {"default": 0.5, "y": -1.5}, energy=1.0).save(tmp_path)
        lora = loaded(tmp_path).base_model.model
        for name, layer in layers_of(model.base_model.model).items():
            expected = sum(w * layer.get_delta_weight(a) for a, w in (("default", 0.5), ("y", -1.5)) if a in layer.r)
            assert_close(lora.get_submodule(name).get_delta_weight("default"), expected.detach(), 1e-5)

    def test_whole_modules_cannot_be_added(self):
        model = adapted(modules_to_save=["head"])
        model.add_adapter("y", RandLoraConfig(r=3, target_modules=["tall"]))
        with pytest.raises(CombinationError, match="modules_to_save"):
            to_lora(model, {"default": 1.0, "y": 1.0}, rank=2)


class TestRefused:
    @pytest.mark.parametrize(
        ("choice", "match"),
        [
            ({}, "one of them"),
            ({"rank": 2, "energy": 0.5}, "one of them"),
            ({"rank": 0}, "rank=0"),
            ({"energy": 0.0}, "energy=0.0"),
            ({"energy": 1.5}, "energy=1.5"),
            ({"rank": {"tall": 2}}, "no rank for 'wide'"),
        ],
        ids=str,
    )
    def test_a_choice_that_means_nothing(self, choice, match):
        with pytest.raises(ConfigError, match=match):
            to_lora(adapted(), **choice)

    def test_an_adapter_that_is_not_there(self):
        with pytest.raises(ConfigError, match=r"no RandLoRA adapter 'z', only 'default'"):
            to_lora(adapted(), "z", rank=2)
        lora = get_peft_model(stack(), LoraConfig(target_modules=["tall"]))
        with pytest.raises(ConfigError, match="only none"):
            to_lora(lora, rank=2)


def test_the_model_is_left_as_it_was():
    model = adapted()
    before = output(model)
    to_lora(model, rank=2)
    assert torch.equal(output(model), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad]


def test_an_adapter_that_was_injected(tmp_path):
    model = llama()
    model.add_adapter(RandLoraConfig(r=4, randlora_alpha=8, target_modules=LLAMA_TARGETS))
    randomise(model)
    to_lora(model, energy=1.0).save(tmp_path)
    assert_close(output(loaded(tmp_path, llama)).detach(), output(model).detach(), 1e-4)


STOCK = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
base, adapter, tokens, expected = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
assert not [name for name in sys.modules if name.startswith("randlora")]
found, expected = model(input_ids=torch.load(tokens)).logits, torch.load(expected)
assert (found - expected).norm() <= 1e-4 * expected.norm(), (found - expected).norm() / expected.norm()
"""


def test_stock_peft_loads_it_without_this_package(tmp_path):
    model = adapted(llama, LLAMA_TARGETS)
    to_lora(model, energy=1.0).save(tmp_path / "lora")
    llama().save_pretrained(tmp_path / "base")
    tokens = torch.arange(10)[None]
    torch.save(tokens, tmp_path / "tokens.pt")
    torch.save(model(input_ids=tokens).logits.detach(), tmp_path / "expected.pt")
    paths = [str(tmp_path / name) for name in ("base", "lora", "tokens.pt", "expected.pt")]
    run = subprocess.run([sys.executable, "-c", STOCK, *paths], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


class TestPeftsOwnConversion:
    """PEFT's functions; they take one adapter that all layers carry, and no biases."""

    @pytest.mark.parametrize("kind", ["linear", "conv1d", "llama"])
    @pytest.mark.parametrize("rank", [3, 0.9])
    def test_convert_to_lora(self, kind, rank, tmp_path):
        build, targets = KINDS[kind]
        model = adapted(build, targets)
        assert model.supports_lora_conversion()
        _, tensors = convert_to_lora(model, rank)
        ours = to_lora(model, **({"rank": rank} if isinstance(rank, int) else {"energy": rank}))
        for layer in ours.layers:
            prefix = f"base_model.model.{layer.name}"
            theirs, mine = (
                t[f"{prefix}.lora_B.weight"] @ t[f"{prefix}.lora_A.weight"] for t in (tensors, ours.tensors)
            )
            assert_close(mine, theirs, 1e-4)

    def test_save_as_lora(self, tmp_path):
        model = adapted(llama, LLAMA_TARGETS)
        save_as_lora(tmp_path, model, rank=1.0)
        # PEFT sums the energy in float32, and stops where what is left, the square of the error, is lost in rounding
        assert_close(output(loaded(tmp_path, llama)).detach(), output(model).detach(), 2e-3)
