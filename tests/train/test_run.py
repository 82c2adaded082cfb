import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from randlora import RandLoraModel
from randlora.errors import ConfigError
from randlora.train.run import resolve, train
from randlora.train.settings import load_settings
from randlora.train.tasks import TASKS
from randlora.train.verify import verify


def settings(model, data, output, **values):
    return load_settings(
        None,
        {"model": model, "data": data, "output_dir": str(output), "r": 8, "batch_size": 16, "max_length": 16, **values},
    )


def losses(run: Path) -> list[float]:
    log = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize("method", ["randlora", "lora", "full", "head"])
def test_every_method_learns_and_leaves_what_it_promises(tmp_path, tiny_bert, reviews, method):
    result = train(settings(tiny_bert, reviews, tmp_path, method=method, epochs=6, learning_rate=3e-3))
    assert np.mean(losses(tmp_path)[-4:]) < np.mean(losses(tmp_path)[:4])
    assert method == "head" or result.metrics["eval_accuracy"] >= 0.5
    assert result.steps == len(losses(tmp_path)) == 42
    assert result.seconds_per_step > 0
    assert result.peak_memory_bytes > 1e8
    folder = Path(result.result_path)
    assert folder.name == {"full": "model", "head": "head"}.get(method, "adapter")
    assert result.result_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 0
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"] == result.metrics
    assert load_settings(tmp_path / "resolved.yaml").method == method


def test_the_adapter_is_randlora_and_predicts_the_same_again(tmp_path, tiny_bert, reviews):
    train(settings(tiny_bert, reviews, tmp_path, epochs=2, learning_rate=5e-3, modules_to_save=["pooler"]))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert isinstance(model.base_model, RandLoraModel)
    verification = verify(tmp_path)
    assert verification.holds
    assert verification.examples == 12
    assert verification.reloaded_difference <= 1e-6


def test_a_wrong_adapter_does_not_pass_the_verification(tmp_path, tiny_bert, reviews):
    train(settings(tiny_bert, reviews, tmp_path, epochs=2, learning_rate=5e-3))
    stored = dict(np.load(tmp_path / "predictions.npz"))
    np.savez(tmp_path / "predictions.npz", logits=stored["logits"] + 0.01, labels=stored["labels"])
    assert not verify(tmp_path).holds


def test_two_runs_are_the_same_run(tmp_path, tiny_bert, reviews):
    for name in "ab":
        train(settings(tiny_bert, reviews, tmp_path / name, dropout=0.1, max_steps=5))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("method", ["randlora", "full"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, tiny_bert, reviews, method):
    common = {"method": method, "max_steps": 8, "save_steps": 4, "dropout": 0.1, "learning_rate": 1e-3}
    train(settings(tiny_bert, reviews, tmp_path / "whole", **common))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/checkpoint-8")
    # a checkpoint that was being written when the power failed
    (tmp_path / "cut/checkpoints/checkpoint-6").mkdir()
    resumed = train(settings(tiny_bert, reviews, tmp_path / "cut", resume="auto", **common))
    assert resumed.steps == 8
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    name = next(Path(resumed.result_path).glob("*.safetensors")).relative_to(tmp_path / "cut")
    whole, cut = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_resuming_what_is_not_there(tmp_path, tiny_bert, reviews):
    assert train(settings(tiny_bert, reviews, tmp_path, resume="auto", max_steps=1)).steps == 1
    with pytest.raises(ConfigError, match="resume='nowhere'"):
        train(settings(tiny_bert, reviews, tmp_path, resume="nowhere", max_steps=1))


@pytest.mark.parametrize("method", ["randlora", "lora", "full"])
def test_causal_language_modelling(tmp_path, tiny_llama, reviews, method):
    result = train(
        settings(tiny_llama, reviews, tmp_path, task="causal-lm", method=method, epochs=4, learning_rate=5e-3)
    )
    assert np.mean(losses(tmp_path)[-3:]) < np.mean(losses(tmp_path)[:3])
    assert result.metrics["eval_perplexity"] == pytest.approx(np.exp(result.metrics["eval_loss"]), rel=1e-4)
    if method == "randlora":
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        assert PeftModel.from_pretrained(base, result.result_path).peft_config["default"].r == 8


def test_causal_chunks_lose_no_token_but_the_rest(tmp_path, tiny_llama, reviews):
    run = resolve(settings(tiny_llama, reviews, tmp_path, task="causal-lm"))
    chunks = TASKS["causal-lm"].prepare(run.data.train, run.processor, run.settings)["input_ids"]
    joined = [token for chunk in chunks for token in chunk]
    assert {len(chunk) for chunk in chunks} == {16}
    expected = [
        token for text in run.data.train["text"] for token in run.processor(text, add_special_tokens=False)["input_ids"]
    ]
    assert joined == expected[: len(joined)]
    assert len(expected) - len(joined) < 16


def test_gradient_checkpointing_accumulation_and_bf16(tmp_path, tiny_bert, reviews):
    plain = settings(tiny_bert, reviews, tmp_path / "a", max_steps=3)
    spare = settings(
        tiny_bert,
        reviews,
        tmp_path / "b",
        max_steps=3,
        batch_size=4,
        gradient_accumulation=4,
        gradient_checkpointing=True,
    )
    train(plain), train(spare)
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-3)
    low = train(settings(tiny_bert, reviews, tmp_path / "c", max_steps=3, bf16=True))
    assert np.isfinite(low.metrics["eval_loss"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model": "no-such-owner/no-such-model"}, "no-such-owner/no-such-model"),
        ({"target_modules": "no_such_module"}, "no_such_module"),
        ({"method": "head", "task": "causal-lm"}, "method='head'"),
        ({"sparse": True, "very_sparse": True}, "sparse and very_sparse"),
    ],
)
def test_settings_that_the_model_refuses(tmp_path, tiny_bert, tiny_llama, reviews, values, expected):
    model = tiny_llama if values.get("task") == "causal-lm" else tiny_bert
    with pytest.raises(ConfigError, match=expected):
        train(settings(**{"model": model, "data": reviews, "output": tmp_path, **values}))


def test_a_diverging_run_says_so(tmp_path, tiny_bert, reviews):
    with pytest.raises(FloatingPointError, match="learning_rate"):
        train(settings(tiny_bert, reviews, tmp_path, method="full", learning_rate=1e30, max_steps=6, warmup_fraction=0))


def test_a_diverging_adapter_is_told_by_its_layer(tmp_path, tiny_bert, reviews):
    with pytest.raises(FloatingPointError, match=r"Not finite: λ of adapter 'default' in .*layer\.0\."):
        train(settings(tiny_bert, reviews, tmp_path, learning_rate=1e30, max_steps=6, warmup_fraction=0))
