"""Importing randlora makes PEFT, and all that is built on PEFT, use it."""

import subprocess
import sys

import peft
import peft.peft_model
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftType,
    get_peft_config,
    inject_adapter_in_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.randlora import RandLoraConfig as TheirConfig
from peft.tuners.randlora import RandLoraModel as TheirModel

import randlora
from randlora import PeftModel, RandLoraConfig, RandLoraLayer, RandLoraModel, get_peft_model
from randlora.tuner.register import register

from .helpers import (
    LLAMA_TARGETS,
    STACK_TARGETS,
    bert,
    gradients,
    layers_of,
    llama,
    output,
    peft_itself,
    randomise,
    stack,
)


def is_ours(model) -> bool:
    found = [m for m in model.modules() if hasattr(m, "randlora_lambda")]
    return bool(found) and all(isinstance(module, RandLoraLayer) for module in found)


class TestRegistries:
    def test_entries(self):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] is RandLoraConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] is RandLoraModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.RANDLORA] == "randlora_"

    def test_registering_again_changes_nothing(self):
        save = peft.peft_model.safe_save_file
        tables = PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
        before = [dict(table) for table in tables]
        register()
        assert peft.peft_model.safe_save_file is save
        assert [dict(table) for table in tables] == before

    def test_other_methods_keep_their_entries(self):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig
        model = get_peft_model(stack(), LoraConfig(r=2, target_modules=STACK_TARGETS))
        assert type(model.base_model) is peft.LoraModel

    def test_the_public_names(self):
        for name in ("RandLoraConfig", "RandLoraModel", "RandLoraLayer", "Linear", "get_peft_model", "PeftModel"):
            assert name in randlora.__all__
            assert hasattr(randlora, name)
        assert randlora.get_peft_model is peft.get_peft_model
        assert randlora.PeftModel is peft.PeftModel

    def test_a_config_dictionary_becomes_ours(self):
        assert type(get_peft_config({"peft_type": "RANDLORA", "r": 5})) is RandLoraConfig

    def test_import_alone_registers(self):
        code = (
            "from peft import PeftType; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m; import randlora; "
            "print(m[PeftType.RANDLORA] is randlora.RandLoraModel)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert run.stdout.strip() == "True", run.stderr


class TestPeftFlows:
    def test_get_peft_model(self):
        model = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS))
        assert type(model) is PeftModel
        assert type(model.base_model) is RandLoraModel
        assert is_ours(model)

    def test_pefts_own_config_gives_our_classes(self):
        config = TheirConfig(r=4, target_modules=STACK_TARGETS, projection_prng_key=6)
        model = peft.get_peft_model(stack(), config)
        assert is_ours(model)
        assert type(model.peft_config["default"]) is RandLoraConfig
        assert model.peft_config["default"].projection_prng_key == 6
        other = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS, projection_prng_key=6))
        assert torch.equal(output(randomise(model)), output(randomise(other)))

    def test_pefts_own_config_for_a_second_adapter(self):
        model = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS))
        model.add_adapter("second", TheirConfig(r=3, target_modules=STACK_TARGETS, projection_prng_key=8))
        assert type(model.peft_config["second"]) is RandLoraConfig
        model.set_adapter("second")
        assert output(randomise(model, "second")).isfinite().all()

    def test_pefts_own_config_is_saved_and_loaded(self, tmp_path):
        model = peft.get_peft_model(stack(), TheirConfig(r=4, target_modules=STACK_TARGETS))
        randomise(model).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(stack(), tmp_path)
        assert torch.equal(output(loaded), output(model))

    @pytest.mark.parametrize("config_class", [RandLoraConfig, TheirConfig])
    def test_inject_adapter_in_model(self, config_class):
        model = inject_adapter_in_model(config_class(r=4, target_modules=STACK_TARGETS), stack())
        assert is_ours(model)
        assert len(layers_of(model)) == 3
        randomise(model)
        output(model).sum().backward()
        assert len([name for name in gradients(model) if "randlora_" in name]) == 6

    def test_injected_adapter_state_round_trip(self):
        config = RandLoraConfig(r=4, target_modules=STACK_TARGETS, randlora_scaling="paper")
        model = randomise(inject_adapter_in_model(config, stack()))
        state = peft.get_peft_model_state_dict(model)
        other = inject_adapter_in_model(config, stack())
        result = peft.set_peft_model_state_dict(other, state)
        assert not result.unexpected_keys
        torch.testing.assert_close(output(other), output(model), rtol=1e-6, atol=1e-6)

    def test_inject_from_a_state_dict(self):
        config = RandLoraConfig(r=4, target_modules=["tall", "wide"])
        model = randomise(inject_adapter_in_model(config, stack()))
        state = peft.get_peft_model_state_dict(model)
        other = inject_adapter_in_model(RandLoraConfig(r=4, target_modules=STACK_TARGETS), stack(), state_dict=state)
        assert sorted(layers_of(other)) == ["tall", "wide"]
        peft.set_peft_model_state_dict(other, state)
        assert torch.equal(output(other), output(model))

    def test_pefts_own_is_there_while_it_is_asked_for(self):
        with peft_itself():
            model = get_peft_model(stack(), TheirConfig(r=4, target_modules=STACK_TARGETS))
            assert type(model.base_model) is TheirModel
        assert is_ours(get_peft_model(stack(), TheirConfig(r=4, target_modules=STACK_TARGETS)))


class TestAutoClasses:
    @pytest.mark.parametrize(
        ("build", "targets", "auto", "task"),
        [
            (llama, LLAMA_TARGETS, AutoPeftModelForCausalLM, "CAUSAL_LM"),
            (bert, ["query", "value"], AutoPeftModelForSequenceClassification, "SEQ_CLS"),
        ],
        ids=["causal", "classification"],
    )
    def test_from_pretrained(self, tmp_path, build, targets, auto, task):
        build().save_pretrained(tmp_path / "base")
        base = type(build()).from_pretrained(tmp_path / "base")
        model = get_peft_model(base, RandLoraConfig(r=4, target_modules=targets, task_type=task))
        assert (
            type(model).__name__
            == {"CAUSAL_LM": "PeftModelForCausalLM", "SEQ_CLS": "PeftModelForSequenceClassification"}[task]
        )
        randomise(model).eval()
        model.save_pretrained(tmp_path / "adapter")
        options = {"num_labels": 3} if task == "SEQ_CLS" else {}
        loaded = auto.from_pretrained(tmp_path / "adapter", **options)
        assert is_ours(loaded)
        assert torch.equal(output(loaded), output(model))

    def test_generation_is_that_of_the_merged_model(self):
        from .helpers import tokens

        model = randomise(
            get_peft_model(llama(), RandLoraConfig(r=4, target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM"))
        )
        model.eval()
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found = model.generate(input_ids=tokens(), **options)
        expected = model.merge_and_unload().generate(input_ids=tokens(), **options)
        assert torch.equal(found, expected)


class TestTransformersFlows:
    @pytest.mark.parametrize("config_class", [RandLoraConfig, TheirConfig])
    def test_add_adapter(self, config_class):
        model = llama()
        model.add_adapter(config_class(r=4, target_modules=LLAMA_TARGETS))
        assert is_ours(model)
        randomise(model)
        output(model).sum().backward()
        assert all(gradient.norm() > 0 for name, gradient in gradients(model).items() if "lambda" in name)

    def test_enable_disable_and_switch(self):
        plain = output(llama())
        model = llama()
        model.add_adapter(RandLoraConfig(r=4, target_modules=LLAMA_TARGETS), "first")
        model.add_adapter(RandLoraConfig(r=3, target_modules=["q_proj"], projection_prng_key=4), "second")
        randomise(model, "first")
        randomise(model, "second")
        assert model.active_adapters() == ["second"]
        second = output(model)
        model.set_adapter("first")
        first = output(model)
        assert not torch.allclose(first, second)
        model.disable_adapters()
        assert torch.equal(output(model), plain)
        model.enable_adapters()
        assert torch.equal(output(model), first)

    @pytest.mark.parametrize("scaling", ["peft", "paper"])
    @pytest.mark.parametrize("save_projection", [True, False])
    def test_save_and_load_adapter(self, tmp_path, scaling, save_projection):
        model = llama()
        config = RandLoraConfig(
            r=4, target_modules=LLAMA_TARGETS, randlora_scaling=scaling, save_projection=save_projection
        )
        model.add_adapter(config)
        randomise(model)
        model.save_pretrained(tmp_path)
        loaded = llama()
        loaded.load_adapter(tmp_path)
        assert is_ours(loaded)
        torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", [{}, {"sparse": True}])
    def test_load_adapter_of_peft(self, tmp_path, kind):
        with peft_itself():
            model = get_peft_model(llama(), TheirConfig(r=4, target_modules=LLAMA_TARGETS, **kind))
            randomise(model).save_pretrained(tmp_path)
        # Transformers reads parameters only, so that the bases in PEFT's file cannot be had: it is said, not silent
        with pytest.warns(UserWarning, match="does not read those in its file"):
            llama().load_adapter(tmp_path)

    def test_load_adapter_whose_bases_this_machine_would_not_draw(self, tmp_path):
        with peft_itself():
            model = get_peft_model(llama(), TheirConfig(r=4, target_modules=LLAMA_TARGETS))
            model.base_model.randlora_A["default"].normal_()
            model.base_model.randlora_B["default"].normal_()
            randomise(model).save_pretrained(tmp_path)
        # Transformers reads parameters only, so that the bases in PEFT's file cannot be had: it is said, not silent
        with pytest.warns(UserWarning, match="does not read those in its file"):
            llama().load_adapter(tmp_path)

    def test_a_folder_saved_with_an_adapter_loads_as_a_whole(self, tmp_path):
        from transformers import LlamaForCausalLM

        base = llama()
        base.save_pretrained(tmp_path / "base")
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.add_adapter(RandLoraConfig(r=4, target_modules=LLAMA_TARGETS))
        randomise(model).save_pretrained(tmp_path / "adapter")
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "adapter")
        assert is_ours(loaded)
        torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-6)
