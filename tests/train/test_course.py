"""The course of a run: interrupted, ended early, kept at its best, followed from outside, in several processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerState
from transformers.integrations import INTEGRATION_TO_CALLBACK

from cli.helpers import invoke
from randlora.errors import ConfigError
from randlora.train import callbacks, run
from randlora.train.run import train
from randlora.train.search import with_found_rate
from randlora.train.settings import TrainSettings, load_settings


def settings(model, data, output, **changes) -> TrainSettings:
    values = {
        "model": model,
        "data": data,
        "output_dir": str(output / "run"),
        "r": 8,
        "max_length": 16,
        "batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "report_to": ["none"],
    }
    return TrainSettings(**{**values, **changes})


def weights(output):
    return load_file(output / "run/adapter/adapter_model.safetensors")


def history(output):
    return [json.loads(line) for line in (output / "run/history.jsonl").read_text().splitlines()]


class CtrlC(TrainerCallback):
    """As somebody at the keyboard."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


class TestInterrupt:
    @pytest.mark.parametrize("best", [None, "loss"])
    def test_the_step_is_finished_kept_and_gone_on_from(self, tiny_bert, reviews, tmp_path, monkeypatch, best):
        steps = {} if best is None else {"best": best, "eval_steps": 2}
        train(settings(tiny_bert, reviews, tmp_path / "whole", **steps))
        with monkeypatch.context() as patch:
            patch.setattr(run, "early_stopping", lambda _: [CtrlC(step=2)])
            with pytest.raises(KeyboardInterrupt):
                train(settings(tiny_bert, reviews, tmp_path / "cut", **steps))
        assert (tmp_path / "cut/run/checkpoints/checkpoint-3/trainer_state.json").is_file()
        assert not (tmp_path / "cut/run/adapter").exists()
        result = train(settings(tiny_bert, reviews, tmp_path / "cut", resume="auto", **steps))
        assert result.steps == 6
        whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
        assert all(torch.equal(whole[name], cut[name]) for name in whole)

    def test_a_second_one_ends_at_once(self):
        watch = callbacks.CheckpointOnInterrupt()
        watch._ask()
        with pytest.raises(KeyboardInterrupt):
            watch._ask()

    def test_the_handler_is_put_back_and_other_threads_have_none(self, tiny_bert, reviews, tmp_path):
        before = signal.getsignal(signal.SIGINT)
        train(settings(tiny_bert, reviews, tmp_path, max_steps=1))
        assert signal.getsignal(signal.SIGINT) is before
        failed = []

        def work():
            try:
                train(settings(tiny_bert, reviews, tmp_path / "thread", max_steps=1))
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failed


class TestBest:
    def test_it_stops_early_and_keeps_the_best(self, tiny_bert, reviews, tmp_path):
        # at this rate the loss of the evaluation soon rises
        chosen = settings(tiny_bert, reviews, tmp_path, learning_rate=0.5, max_steps=60, eval_steps=2, early_stopping=2)
        result = train(chosen)
        found = [entry["eval_loss"] for entry in history(tmp_path) if "eval_loss" in entry]
        assert result.steps < 60
        assert min(found) < found[-1]
        assert result.metrics["eval_loss"] == pytest.approx(min(found), rel=1e-5)

    def test_each_epoch_where_no_steps_are_named(self, tiny_bert, reviews, tmp_path):
        train(settings(tiny_bert, reviews, tmp_path, best="accuracy", max_steps=None, epochs=2))
        assert len([entry for entry in history(tmp_path) if "eval_accuracy" in entry]) == 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"best": "loss", "eval_steps": 4, "save_steps": 6}, "save_steps=6: the best checkpoint is only known"),
            ({"early_stopping": 2, "save_steps": 6}, "save_steps=6 with best='loss' needs eval_steps"),
            ({"early_stopping": 0}, "early_stopping=0"),
            ({"method": "full", "quantization": "4bit"}, "quantization='4bit': method='full' has no adapter"),
            ({"method": "vera", "alpha": 4}, "alpha=4.0: VeRA has none"),
            ({"packing": True}, "packing=True is for causal-lm and chat"),
            ({"chat_template": "x"}, "chat_template='x' is for chat, dpo, kto and orpo"),
        ],
    )
    def test_settings_that_do_not_fit_together(self, changes, message):
        with pytest.raises(ConfigError) as raised:
            load_settings(overrides={"model": "m", "data": "d", **changes})
        assert message in str(raised.value)

    def test_a_metric_that_the_task_does_not_have(self, tiny_bert, reviews, tmp_path):
        with pytest.raises(ConfigError, match=r"best='f1': sequence-classification measures loss, accuracy"):
            train(settings(tiny_bert, reviews, tmp_path, best="f1"))


class TestTrackers:
    def test_tensorboard_gets_the_losses(self, tiny_bert, reviews, tmp_path):
        train(settings(tiny_bert, reviews, tmp_path, report_to=None, max_steps=3))
        (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
        events = EventAccumulator(str(file.parent))
        events.Reload()
        logged = [entry["loss"] for entry in history(tmp_path) if "loss" in entry]
        assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged, rel=1e-5)

    def test_tensorboard_gets_the_evaluation_at_the_end(self, tiny_bert, reviews, tmp_path):
        done = train(settings(tiny_bert, reviews, tmp_path, report_to=None, max_steps=2))
        (file,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
        events = EventAccumulator(str(file))
        events.Reload()
        (accuracy,) = events.Scalars("eval/accuracy")
        assert (accuracy.step, accuracy.value) == (2, pytest.approx(done.metrics["eval_accuracy"]))

    def test_one_run_by_the_name_of_the_folder_with_everything_in_it(self, tiny_bert, reviews, tmp_path, monkeypatch):
        told = []

        class Diary(TrainerCallback):
            def on_train_begin(self, args, state, control, **more):
                told.append(f"begin {args.run_name}")

            def on_log(self, args, state, control, logs, **more):
                told.append("evaluation" if "eval_loss" in logs else "step")

            def on_train_end(self, args, state, control, **more):
                told.append("end")

        for name in ("wandb", "mlflow"):
            monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, Diary)
        train(settings(tiny_bert, reviews, tmp_path, report_to=["wandb", "mlflow"], max_steps=1))
        each = ["begin run", "step", "step", "evaluation", "end"]  # the second has the run's means
        assert told == [event for event in each for _ in range(2)]

    def test_a_run_that_fails_behind_its_last_step_is_ended(self, tiny_bert, reviews, tmp_path, monkeypatch):
        ended = []

        class Diary(TrainerCallback):
            def on_train_end(self, args, state, control, **more):
                ended.append(True)

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Diary)
        monkeypatch.setattr("randlora.train.run._save_result", fail)
        with pytest.raises(OSError, match="disk full"):
            train(settings(tiny_bert, reviews, tmp_path, report_to=["wandb"], max_steps=1))
        assert ended == [True]

    @pytest.mark.parametrize(("name", "message"), [("nothing", "known are none"), ("comet_ml", "comet")])
    def test_others_are_refused_before_anything_is_loaded(self, tmp_path, name, message):
        with pytest.raises(ConfigError, match=message):
            train(settings("no-model", "no-data", tmp_path, report_to=[name]))
        with pytest.raises(ConfigError, match=message):
            with_found_rate(settings("no-model", "no-data", tmp_path, report_to=[name], learning_rate="auto"))

    @pytest.mark.parametrize(
        ("name", "remedy"),
        [("wandb", "WANDB_MODE=offline"), ("mlflow", "MLFLOW_TRACKING_URI"), ("swanlab", "environment variables")],
    )
    def test_one_that_does_not_start_is_one_line(self, tiny_bert, reviews, tmp_path, monkeypatch, name, remedy):
        class Stranger(Exception):
            pass

        class Closed(TrainerCallback):
            def on_train_begin(self, args, state, control, **more):
                raise Stranger("no key\nat all " + "x" * 1000)

            def on_step_begin(self, args, state, control, **more):
                raise AssertionError

        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, Closed)
        given = settings(tiny_bert, reviews, tmp_path, report_to=[name]).model_dump(exclude_unset=True)
        (tmp_path / "run.yaml").write_text(json.dumps(given))
        said = invoke("train", "--config", tmp_path / "run.yaml", code=2).output
        (line,) = (line for line in said.splitlines() if line.startswith("error"))
        assert line.startswith(f"error: report_to='{name}' does not start: ")
        assert remedy in line
        assert "`--report-to none` (docs/trackers.md). It says: Stranger: no key at all x" in line
        assert len(line) < 700

    def test_one_that_fails_later_leaves_the_run(self, tiny_bert, reviews, tmp_path, monkeypatch):
        told = []

        class Lost(TrainerCallback):
            def on_log(self, args, state, control, **more):
                told.append(state.global_step)
                raise ConnectionError("gone")

        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mlflow", Lost)
        with pytest.warns(UserWarning, match="mlflow has failed and gets no more of this run: ConnectionError: gone"):
            done = train(settings(tiny_bert, reviews, tmp_path, report_to=["mlflow"], max_steps=2))
        assert (done.steps, told) == (2, [1])


def test_two_processes_train_as_one(tiny_bert, reviews, tmp_path):
    train(settings(tiny_bert, reviews, tmp_path / "one", batch_size=8))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    config = tmp_path / "two.yaml"
    chosen = settings(tiny_bert, reviews, tmp_path / "two", batch_size=4).model_dump()
    config.write_text(json.dumps(chosen))
    done = subprocess.run(
        [*command, "-m", "randlora", "train", "--config", str(config), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)  # one of the two prints
    assert result["steps"] == 6
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-4)
    losses = [[entry["loss"] for entry in history(tmp_path / part) if "loss" in entry] for part in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


class TestNothingLearned:
    def state(self, losses):
        return TrainerState(log_history=[{"loss": loss} for loss in losses] + [{"eval_loss": 9.0}])

    def test_it_is_said_with_the_rate(self):
        with pytest.warns(UserWarning, match=r"has not fallen: 0.7000 .* 0.7000 in the last. learning_rate=3.0"):
            callbacks.warn_unless_learned(self.state([0.7, 0.7, *[50.0] * 16, 0.7, 0.7]), 3.0)

    @pytest.mark.parametrize("losses", [[0.7] * 19, [0.7] * 10 + [0.6] * 10, []], ids=["few", "fallen", "none"])
    def test_other_runs_are_left_in_peace(self, losses):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            callbacks.warn_unless_learned(self.state(losses), 3.0)
