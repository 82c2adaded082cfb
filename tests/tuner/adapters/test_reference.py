"""TRL's preference trainers on an adapter that was trained before: what they compare it with is that adapter.

A policy that is its own reference has known numbers: DPO's loss is ln 2, KTO's is 1/2, and the divergence is 0.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from randlora import BasisMismatchError, PeftModel, RandLoraConfig, get_peft_model

from ..helpers import (
    LLAMA_TARGETS,
    TheirConfig,
    assert_close,
    assert_same_tensors,
    layers_of,
    llama,
    output,
    peft_itself,
    randomise,
)

trl = pytest.importorskip("trl")

CONFIG = {"r": 4, "randlora_alpha": 80, "target_modules": LLAMA_TARGETS, "task_type": "CAUSAL_LM"}
QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "seed": 0, "logging_steps": 1}
STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
SAMPLED = {"max_completion_length": 4, "num_generations": 2, "beta": 0.5}


@pytest.fixture
def base(tiny_llama):
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def processing(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama, eos_token="[SEP]", padding_side="left")


@pytest.fixture
def folder(base, tmp_path):
    """An adapter that was trained before; its update is a good part of the weights."""
    randomise(get_peft_model(base(), RandLoraConfig(**CONFIG))).save_pretrained(tmp_path / "first")
    return tmp_path / "first"


def pretrained(base, folder):
    return PeftModel.from_pretrained(base(), folder, is_trainable=True)


def dpo(model, processing, sentences, path, settings=None, **more):
    texts = [text for text, _ in sentences[:16]]
    rows = [{"prompt": "it is", "chosen": a, "rejected": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    args = trl.DPOConfig(str(path), **{**STEPS, **QUIET, **(settings or {})})
    return trl.DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=processing, **more)


def kto(model, processing, sentences, path, **more):
    rows = [{"prompt": "it is", "completion": text, "label": label == "positive"} for text, label in sentences[:16]]
    args = trl.KTOConfig(str(path), **STEPS, **QUIET)
    return trl.KTOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=processing, **more)


def grpo(model, processing, sentences, path, **more):
    args = trl.GRPOConfig(str(path), **STEPS, **QUIET, **SAMPLED)
    return trl.GRPOTrainer(model, length, args, prompts(sentences), processing_class=processing, **more)


def rloo(model, processing, sentences, path, **more):
    args = trl.RLOOConfig(str(path), **STEPS, **QUIET, **SAMPLED)
    return trl.RLOOTrainer(model, length, args, prompts(sentences), processing_class=processing, **more)


def prompts(sentences):
    return Dataset.from_list([{"prompt": text} for text, _ in sentences[:16]])


def length(completions, **_):
    return [float(len(text)) for text in completions]


TRAINERS = {
    "dpo": (dpo, "loss", math.log(2)),
    "kto": (kto, "loss", 0.5),
    "grpo": (grpo, "kl", 0),
    "rloo": (rloo, "kl", 0),
}


def values(model, adapter):
    return {
        name.removesuffix(f".{adapter}"): value.detach().clone()
        for name, value in model.named_parameters()
        if "randlora_" in name and name.endswith(f".{adapter}")
    }


def first(trainer, name):
    return next(entry[name] for entry in trainer.state.log_history if name in entry)


@pytest.mark.parametrize("kind", TRAINERS)
class TestEveryTrainer:
    def test_the_reference_is_the_adapter_that_was_trained_before(
        self, kind, base, folder, processing, sentences, tmp_path
    ):
        if kind == "kto" and Version(trl.__version__) < Version("1.2"):
            pytest.skip("this trl's KTOTrainer compares every adapter, LoRA's too, with the base model")
        build, name, expected = TRAINERS[kind]
        model = pretrained(base, folder)
        before = values(model, "default")
        trainer = build(model, processing, sentences, tmp_path)
        trainer.train()
        assert first(trainer, name) == pytest.approx(expected, abs=1e-5)
        assert_same_tensors(values(model, "ref"), before)
        after = values(model, "default")
        assert not any(torch.equal(after[key], value) for key, value in before.items())

    def test_a_fresh_adapter_is_compared_with_the_base_model(self, kind, base, processing, sentences, tmp_path):
        build, name, expected = TRAINERS[kind]
        trainer = build(base(), processing, sentences, tmp_path, peft_config=RandLoraConfig(**CONFIG))
        trainer.train()
        assert first(trainer, name) == pytest.approx(expected, abs=1e-5)
        assert list(trainer.model.peft_config) == ["default"]


class TestDpo:
    def test_what_the_reference_says_is_what_the_merged_adapter_says(
        self, base, folder, processing, sentences, tmp_path
    ):
        settings = {"precompute_ref_log_probs": True}
        trainer = dpo(pretrained(base, folder), processing, sentences, tmp_path, settings)
        merged = PeftModel.from_pretrained(base(), folder).merge_and_unload().double().eval()
        for row in trainer.train_dataset:
            for answer in ("chosen", "rejected"):
                expected = log_likelihood(merged, row["prompt_ids"], row[f"{answer}_ids"])
                assert row[f"ref_{answer}_logps"] == pytest.approx(expected, rel=1e-5)

    def test_a_reference_model_that_is_given_is_taken(self, base, folder, processing, sentences, tmp_path):
        other = PeftModel.from_pretrained(base(), folder).merge_and_unload()
        model = pretrained(base, folder)
        trainer = dpo(model, processing, sentences, tmp_path, ref_model=other)
        trainer.train()
        assert first(trainer, "loss") == pytest.approx(math.log(2), abs=1e-5)

    def test_both_adapters_are_saved_and_training_resumes_with_the_same_reference(
        self, base, folder, processing, sentences, tmp_path
    ):
        settings = {"save_steps": 1}
        model = pretrained(base, folder)
        before = values(model, "default")
        whole = dpo(model, processing, sentences, tmp_path / "whole", settings)
        whole.train()
        middle = tmp_path / "whole" / "checkpoint-1"
        assert_same_tensors(values(PeftModel.from_pretrained(base(), middle / "ref"), "default"), before)

        resumed = dpo(pretrained(base, folder), processing, sentences, tmp_path / "resumed", settings)
        resumed.train(resume_from_checkpoint=str(middle))
        assert_same_tensors(values(resumed.model, "ref"), before)
        assert_same_tensors(values(resumed.model, "default"), values(whole.model, "default"))


def log_likelihood(model, prompt, answer):
    """The logarithm of the probability of ``answer`` after ``prompt``, both token by token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    chosen = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1).gather(1, torch.tensor(answer)[:, None])
    return float(chosen.sum())


def test_online_dpo_copies_the_model(base, folder, processing, sentences, tmp_path):
    online = pytest.importorskip("trl.experimental.online_dpo")
    model = pretrained(base, folder)
    before = values(model, "default")
    args = online.OnlineDPOConfig(str(tmp_path), max_new_tokens=4, beta=0.5, **STEPS, **QUIET)
    trainer = online.OnlineDPOTrainer(
        model, reward_funcs=length, args=args, train_dataset=prompts(sentences), processing_class=processing
    )
    trainer.train()
    assert first(trainer, "loss") == pytest.approx(math.log(2), abs=1e-4)  # it logs four digits
    assert_same_tensors(values(trainer.ref_model, "default"), before)


class TestTeacher:
    """An adapter that is the average of the trained one over the steps, as TRL's self-distillation has it."""

    def average(self, model):
        callbacks = pytest.importorskip("trl.experimental.sdft.teacher_sync")
        callback = callbacks.PEFTAdapterEMACallback(model, update_rate=0.5)
        callback.on_train_begin(None, None, None)
        callback.on_step_end(None, SimpleNamespace(global_step=1), None)

    def test_it_averages_lambda_and_gamma(self):
        model = randomise(get_peft_model(llama(), RandLoraConfig(**CONFIG, save_projection=False)))
        self.average(model)
        for layer in layers_of(model).values():  # TRL starts at zero: half of λ, half of γ
            assert_close(layer.get_delta_weight("teacher"), layer.get_delta_weight("default") / 4, 1e-6)

    def test_averaged_bases_are_refused(self):
        model = randomise(get_peft_model(llama(), RandLoraConfig(**CONFIG)))
        with pytest.raises(BasisMismatchError, match="save_projection=False"):
            self.average(model)


class TestAdded:
    """``model.add_adapter("ref", model.peft_config["default"])``, and TRL's copy of what it finds by name."""

    def as_trl_does(self, model):
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
        return model.eval()

    def assert_same_outputs(self, model):
        with torch.no_grad():
            expected = output(model)
            with model.disable_adapter():
                assert (output(model) - expected).abs().max() > 1e-2
            model.set_adapter("ref")
            assert torch.equal(output(model), expected)

    def assert_same_when_saved(self, model, folder):
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(llama(), folder / "ref").eval()
        assert_close(output(again).detach(), output(model).detach(), 1e-6)

    @pytest.mark.parametrize(
        "config",
        [
            {"randlora_scaling": "paper", "randlora_alpha": 800},
            {"sparse": True},
            {"save_projection": False},
            {"rank_pattern": {"up_proj": 3}},
            {"init_weights": False},
            {"modules_to_save": ["lm_head"]},
            {"trainable_token_indices": list(range(50))},
            {"target_modules": ["o_proj"], "target_parameters": ["q_proj.weight"]},
            {"target_modules": ["embed_tokens", "lm_head"]},
        ],
        ids=lambda config: next(iter(config)),
    )
    def test_an_adapter_from_a_file(self, config, tmp_path):
        model = randomise(get_peft_model(llama(), RandLoraConfig(**{**CONFIG, **config})))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save.default" in name or "tokens_delta.default" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(tmp_path)
        model = self.as_trl_does(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))
        self.assert_same_outputs(model)
        self.assert_same_when_saved(model, tmp_path / "both")

    def test_an_adapter_with_bases_of_its_own(self, tmp_path):
        with peft_itself():
            config = TheirConfig(r=4, target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM")
            model = randomise(get_peft_model(llama(), config))
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if "randlora_A" in name:
                        buffer.neg_()
            model.save_pretrained(tmp_path)
            expected = output(model.eval()).detach()
        model = self.as_trl_does(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))
        assert_close(output(model).detach(), expected, 1e-5)
        self.assert_same_outputs(model)
        self.assert_same_when_saved(model, tmp_path / "both")

    def test_an_adapter_that_was_scaled(self):
        model = randomise(get_peft_model(llama(), RandLoraConfig(**CONFIG)))
        for layer in layers_of(model).values():
            layer.set_scale("default", 0.5)
        self.assert_same_outputs(self.as_trl_does(model))

    def test_an_adapter_in_half_precision_is_copied_to_float32(self):
        config = RandLoraConfig(**CONFIG)
        model = randomise(get_peft_model(llama().bfloat16(), config, autocast_adapter_dtype=False))
        self.as_trl_does(model)
        expected = {name: value.float() for name, value in values(model, "default").items()}
        assert_same_tensors(values(model, "ref"), expected)

    def test_it_is_apart_from_the_adapter_it_was_copied_from(self):
        model = self.as_trl_does(randomise(get_peft_model(llama(), RandLoraConfig(**CONFIG))))
        before = values(model, "ref")
        assert not any(value.requires_grad for name, value in model.named_parameters() if name.endswith(".ref"))
        randomise(model, seed=8)
        assert_same_tensors(values(model, "ref"), before)

    @pytest.mark.parametrize("name", ["ref", "other"])
    def test_any_other_adapter_is_fresh(self, name):
        model = randomise(get_peft_model(llama(), RandLoraConfig(**CONFIG)))
        model.add_adapter(name, RandLoraConfig(**CONFIG) if name == "ref" else model.peft_config["default"])
        lambdas = {key: value for key, value in values(model, name).items() if key.endswith("lambda")}
        assert lambdas
        assert not any(value.any() for value in lambdas.values())
