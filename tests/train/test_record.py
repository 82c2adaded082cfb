import json
import math
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from randlora.train import record
from randlora.train.measure import StepTimer
from randlora.train.run import train
from randlora.train.settings import load_settings
from randlora.train.tasks import TASKS
from randlora.tuner.files.adapter_folder import read_adapter
from randlora.tuner.shapes import known_shapes


def settings(model, data, output, **values):
    common = {"model": model, "data": data, "output_dir": str(output), "r": 8, "batch_size": 16, "max_length": 16}
    return load_settings(None, {**common, **values})


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert, reviews):
    folder = tmp_path_factory.mktemp("run")
    train(settings(tiny_bert, reviews, folder, epochs=2, eval_steps=4, save_steps=4, learning_rate=5e-3))
    return folder


def test_each_step_says_what_it_did_and_cost(run):
    steps = [entry for entry in lines(run / "history.jsonl") if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 15))
    for entry in steps:
        assert entry["loss"] > 0
        assert entry["grad_norm"] > 0
        assert entry["learning_rate"] >= 0
        assert 0 < entry["seconds"] < 60
        assert 1e8 < entry["memory_bytes"] < 1e12
    assert [entry["step"] for entry in lines(run / "history.jsonl") if "eval_loss" in entry] == [4, 8, 12, 14]


def test_environment_names_versions_and_nobody(run):
    found = json.loads((run / "environment.json").read_text())
    assert found["packages"]["torch"] == torch.__version__
    assert {"python", "platform", "processors", "started", "devices"} <= found.keys()


def test_shapes_can_be_told_without_the_base_model(run):
    shapes = known_shapes(read_adapter(run / "adapter"), run / "base_model")
    assert len(shapes) == 13  # six in each of two layers, and the pooler
    layer = shapes["bert.encoder.layer.1.intermediate.dense"]
    assert (layer.out_features, layer.in_features) == (48, 32)


def test_predictions_agree_with_the_logits(run, sentences):
    rows, stored = lines(run / "predictions.jsonl"), np.load(run / "predictions.npz")
    logits = torch.tensor(stored["logits"]).double()
    labels = torch.tensor(stored["labels"])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert [row["loss"] for row in rows] == pytest.approx(losses.tolist())
    assert [row["confidence"] for row in rows] == pytest.approx(logits.softmax(-1).amax(-1).tolist())
    names = ["negative", "positive"]
    assert [row["predicted"] for row in rows] == [names[i] for i in logits.argmax(-1)]
    right = dict(sentences)
    assert all(right[row["text"]] == row["label"] for row in rows)


def test_chunks_of_a_language_model_have_their_own_losses(tmp_path, tiny_llama, reviews, tokenizer):
    result = train(settings(tiny_llama, reviews, tmp_path, task="causal-lm", method="full", max_steps=1))
    rows = lines(tmp_path / "predictions.jsonl")
    assert np.mean([row["loss"] for row in rows]) == pytest.approx(result.metrics["eval_loss"], rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for row in rows[:2]:
        assert row["confidence"] == pytest.approx(math.exp(-row["loss"]))
        ids = tokenizer(row["text"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert model(ids, labels=ids).loss.item() == pytest.approx(row["loss"], rel=1e-4)


def test_a_resumed_run_has_one_entry_for_each_step_with_its_costs(run, tmp_path, tiny_bert, reviews):
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    for gone in ("checkpoints/checkpoint-12", "checkpoints/checkpoint-14"):
        shutil.rmtree(cut / gone, ignore_errors=True)
    shutil.copytree(run / "checkpoints/checkpoint-12", cut / "checkpoints/checkpoint-12")
    again = settings(tiny_bert, reviews, cut, epochs=2, eval_steps=4, save_steps=4, learning_rate=5e-3, resume="auto")
    train(again)
    whole, resumed = ([e for e in lines(f / "history.jsonl") if "loss" in e] for f in (run, cut))
    assert [e["loss"] for e in resumed] == [e["loss"] for e in whole]
    assert [e["seconds"] for e in resumed[:12]] == [e["seconds"] for e in whole[:12]]
    assert all("memory_bytes" in e for e in resumed)


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from randlora.train import record, run
from randlora.train.settings import load_settings

class Kill(record.HistoryFile):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

record.HistoryFile = Kill
model, data, output = sys.argv[1:]
run.train(load_settings(None, {"model": model, "data": data, "output_dir": output, "r": 8, "max_length": 16}))
"""


def test_a_killed_run_leaves_the_steps_that_it_took(tmp_path, tiny_bert, reviews):
    process = subprocess.run([sys.executable, "-c", KILLED, tiny_bert, reviews, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert [entry["step"] for entry in lines(tmp_path / "history.jsonl")] == [1, 2, 3]
    assert not (tmp_path / "metrics.json").exists()


def test_no_number_is_null_and_the_file_stays_json(tmp_path):
    timer = StepTimer()
    timer.seconds.append(0.5)
    history = record.HistoryFile(tmp_path, timer)
    state = TrainerState(log_history=[{"loss": math.nan, "grad_norm": math.inf, "step": 1}])
    history.on_log(TrainingArguments(str(tmp_path)), state, TrainerControl())
    text = (tmp_path / "history.jsonl").read_text()
    entry = json.loads(text, parse_constant=pytest.fail)
    assert (entry["loss"], entry["grad_norm"], entry["seconds"]) == (None, None, 0.5)


def test_a_model_that_predicts_nan_leaves_a_readable_file(tmp_path):
    rows = Dataset.from_dict({"text": ["x\u2028" * 2500], "label": [1]})
    task = TASKS["sequence-classification"]
    record.write_predictions(tmp_path, task.records(rows, rows, np.full((1, 2), np.nan), ["a", "b"], None))
    (row,) = lines(tmp_path / "predictions.jsonl")
    assert row["loss"] is None
    assert row["confidence"] is None
    assert len(row["text"]) == 1000
