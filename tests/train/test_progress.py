"""How a run goes, in lines."""

import sys

from tqdm.auto import tqdm
from transformers import TrainerState, TrainingArguments

from randlora.train import progress
from randlora.train.run import train
from randlora.train.settings import load_settings


def told(callback, capsys, step, **logs):
    """What is said of a log at a step of ten."""
    callback.on_log(None, TrainerState(global_step=step, max_steps=10, is_world_process_zero=True), None, logs=logs)
    return capsys.readouterr().err


def test_a_run_says_how_it_goes_and_nothing_else(tiny_bert, reviews, tmp_path, capfd):
    values = {"model": tiny_bert, "data": reviews, "r": 8, "max_length": 16, "max_steps": 4, "eval_steps": 2}
    train(load_settings(overrides={**values, "output_dir": str(tmp_path)}))
    said = capfd.readouterr().err
    assert "step 2, evaluation: loss " in said
    assert "step 4 of 4: loss " in said
    assert ", 0:00:00 left" in said
    assert "loss=" not in said  # on a bar


def test_lines_are_rare_but_the_last_step_has_one(capsys):
    callback = progress.CostInLines(seconds=3600)
    callback.on_train_begin(None, TrainerState(), None)
    assert told(callback, capsys, 1, loss=0.5).startswith("step 1 of 10: loss 0.5000, memory ")
    assert not told(callback, capsys, 2, loss=0.5)
    assert told(callback, capsys, 2, eval_loss=0.25, eval_f1=0.5, eval_runtime=3.0) == (
        "step 2, evaluation: loss 0.2500, f1 0.5000\n"
    )
    assert not told(callback, capsys, 3, train_runtime=1.0)
    assert told(callback, capsys, 10, loss=0.5).endswith("0:00:00 left\n")


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(monkeypatch):
    monkeypatch.setattr(progress.time, "perf_counter", iter([100.0, 104.0]).__next__)
    pace = progress.Pace(TrainerState(global_step=8, max_steps=12))
    assert pace.left(TrainerState(global_step=10, max_steps=12)) == "0:00:04"


def test_the_bar_of_a_resumed_run_begins_there(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.trainer_callback.tqdm", lambda **options: tqdm(file=sys.stderr, **options))
    state = TrainerState(global_step=8, max_steps=12, is_world_process_zero=True)
    callback = progress.CostOnBar()
    callback.on_train_begin(TrainingArguments(output_dir=str(tmp_path)), state, None)
    assert (callback.training_bar.initial, callback.training_bar.n) == (8, 8)
    state.global_step = 9
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 0.5})
    assert callback.training_bar.n == 9
    assert "loss=0.5000" in callback.training_bar.postfix
    callback.on_train_end(None, state, None)
