"""Real runs of ``transformers.Trainer`` and TRL's ``SFTTrainer`` on a tiny model."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from randlora import PeftModel, RandLoraConfig, RandLoraModel, get_peft_model

from .helpers import LLAMA_TARGETS, assert_close, assert_same_tensors, llama, randomise, tokens

CONFIG = {"r": 4, "randlora_alpha": 80, "target_modules": LLAMA_TARGETS, "task_type": "CAUSAL_LM"}
QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, "logging_steps": 1}


def adapter(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "randlora_" in name}


class TestTrainer:
    def trainer(self, folder, steps=6):
        rows = tokens(batch=24)
        data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")
        settings = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            **QUIET,
        )
        model = get_peft_model(llama(), RandLoraConfig(**CONFIG))
        return Trainer(model, settings, train_dataset=data, eval_dataset=data)

    def test_trains_evaluates_saves_loads_the_best_and_merges(self, tmp_path):
        trainer = self.trainer(tmp_path)
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(losses) == 3
        assert losses[-1] < losses[1] < losses[0]
        best = trainer.state.best_model_checkpoint
        assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-5)
        model = trainer.model.eval()
        again = PeftModel.from_pretrained(llama(), best).eval()
        assert_same_tensors(adapter(again), adapter(model))
        expected = model(input_ids=tokens()).logits.detach()
        assert_close(model.merge_and_unload()(input_ids=tokens()).logits.detach(), expected, 1e-5)

    def test_resumes_where_it_stopped(self, tmp_path):
        whole = self.trainer(tmp_path / "whole")
        whole.train()
        resumed = self.trainer(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        last = [PeftModel.from_pretrained(llama(), tmp_path / run / "checkpoint-6") for run in ("whole", "resumed")]
        assert_same_tensors(adapter(last[1]), adapter(last[0]))

    def test_the_optimizer_holds_lambda_and_gamma_alone(self, tmp_path):
        trainer = self.trainer(tmp_path, steps=2)
        trainer.train()
        held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
        assert held == sum(value.numel() for value in adapter(trainer.model).values())


class TestSft:
    def trainer(self, model, tokenizer, folder, sentences, **config):
        trl = pytest.importorskip("trl")
        data = Dataset.from_dict({"text": [text for text, _ in sentences[:24]]})
        settings = trl.SFTConfig(
            folder, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, max_length=16, bf16=False, **QUIET
        )
        return trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, **config)

    def test_with_our_config(self, tiny_llama, sentences, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama, eos_token="[SEP]")
        config = RandLoraConfig(**CONFIG)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        trainer = self.trainer(base, tokenizer, tmp_path, sentences, peft_config=config)
        assert isinstance(trainer.model.base_model, RandLoraModel)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        trainer.save_model(tmp_path / "last")
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        again = PeftModel.from_pretrained(base, tmp_path / "last").eval()
        ids = tokens()
        expected = trainer.model.eval()(input_ids=ids).logits.detach()
        assert_close(again(input_ids=ids).logits.detach(), expected, 1e-5)
        assert_close(again.merge_and_unload()(input_ids=ids).logits.detach(), expected, 1e-5)

    def test_trains_a_model_that_was_adapted_before(self, tiny_llama, sentences, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama, eos_token="[SEP]")
        model = randomise(get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), RandLoraConfig(**CONFIG)))
        before = adapter(model)
        trainer = self.trainer(model, tokenizer, tmp_path, sentences)
        trainer.train()
        assert not any(torch.equal(value, before[name]) for name, value in adapter(trainer.model).items())
        assert trainer.state.global_step == 4
