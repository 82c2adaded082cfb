import json

import pytest
import torch
from safetensors.torch import load_file

from randlora.errors import ConfigError
from randlora.train import run
from randlora.train.measure import StepTimer
from randlora.train.settings import load_settings

STEPS = {"r": 8, "batch_size": 16, "max_length": 16, "max_steps": 8, "save_steps": 4, "schedule": "constant"}


@pytest.fixture
def start(tmp_path, tiny_bert, reviews):
    """Trains in ``tmp_path``/name with some settings changed."""

    def train(name, **changes):
        values = {"model": tiny_bert, "data": reviews, "output_dir": str(tmp_path / name), **STEPS, **changes}
        return run.train(load_settings(None, values))

    return train


def weights(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def cut_after(monkeypatch, step):
    """Runs are interrupted after so many steps, as by Ctrl-C."""

    class Interrupted(StepTimer):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == step:
                raise KeyboardInterrupt

    monkeypatch.setattr(run, "StepTimer", Interrupted)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(start, tmp_path, monkeypatch):
    whole = start("whole")
    with monkeypatch.context() as patch:
        cut_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            start("cut")
    resumed = start("cut", resume="auto")
    assert resumed.steps == whole.steps == 8
    for name in ("train_loss", "eval_loss", "eval_accuracy"):
        assert resumed.metrics[name] == whole.metrics[name]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["randlora", "lora", "full", "head"])
def test_resuming_a_finished_run_takes_no_further_step(start, method):
    finished = start("run", method=method)
    again = start("run", method=method, resume="auto")
    assert again.steps == 8
    assert again.seconds_per_step is None
    for name in ("train_loss", "eval_loss", "eval_accuracy"):
        assert again.metrics[name] == finished.metrics[name]


@pytest.mark.parametrize("changed", [{"r": 4}, {"method": "lora"}, {"learning_rate": 1e-2}, {"max_steps": 12}])
def test_a_checkpoint_of_another_run_is_refused(start, changed):
    start("run")
    name, value = next(iter(changed.items()))
    with pytest.raises(ConfigError, match=f"(?s)other settings.*{name}: .* there, {value!r} here"):
        start("run", resume="auto", **changed)


def test_where_and_how_often_a_run_writes_may_change(start, tmp_path):
    start("run")
    checkpoint = tmp_path / "run/checkpoints/checkpoint-4"
    elsewhere = start("elsewhere", resume=str(checkpoint), save_steps=2)
    assert elsewhere.steps == 8
    first, second = weights(tmp_path / "run"), weights(tmp_path / "elsewhere")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_new_run_does_not_mix_its_checkpoints_with_an_earlier_one(start):
    start("run")
    with pytest.raises(ConfigError, match=r"holds checkpoints of an earlier run.*resume=auto"):
        start("run")


def test_a_checkpoint_that_was_cut_off_is_passed_over(start, tmp_path):
    whole = start("run")
    first, last = (tmp_path / f"run/checkpoints/checkpoint-{step}/trainer_state.json" for step in (4, 8))
    last.write_text(last.read_text()[:99])
    assert start("run", resume="auto").metrics["train_loss"] == whole.metrics["train_loss"]
    first.write_text("")
    with pytest.raises(ConfigError, match="not the folder of a complete checkpoint"):
        start("run", resume=str(first.parent))


def test_a_checkpoint_without_its_settings_is_refused(start, tmp_path):
    start("run")
    (tmp_path / "run/resolved.yaml").unlink()
    with pytest.raises(ConfigError, match=r"resolved\.yaml"):
        start("run", resume="auto")


def test_a_diverging_run_ends_at_once_and_leaves_no_spoilt_checkpoint(start, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+ is nan.*learning_rate"):
        start("run", method="full", learning_rate=1e30, warmup_fraction=0, save_steps=1)
    for state in (tmp_path / "run/checkpoints").glob("*/trainer_state.json"):
        assert "NaN" not in json.dumps(json.loads(state.read_text())["log_history"])
