import json
import math

import pytest

from randlora.errors import ConfigError
from randlora.report.runs import number, read_runs
from randlora.report.summary import COLUMNS, summary
from report.samples import write_run


def cells(run):
    return dict(zip(COLUMNS, [cell.text for cell in summary(run)], strict=True))


def test_a_finished_run(tmp_path):
    result = {
        "steps": 6,
        "metrics": {"eval_loss": 0.5, "eval_accuracy": 0.8, "train_loss": 1},
        "peak_memory_bytes": 3e9,
    }
    texts = "".join(json.dumps({"text": "two\u2028lines", "loss": n}, ensure_ascii=False) + "\n" for n in range(100))
    (run,) = read_runs([write_run(tmp_path / "a", metrics__json=result, predictions__jsonl=texts)])
    assert (run.name, run.method, len(run.steps), run.remarks) == ("a", "lora", 6, ())
    assert [entry["step"] for entry in run.evaluations] == [3, 6]  # that of the last step once
    assert run.evaluations[-1] == {"eval_loss": 0.5, "eval_accuracy": 0.8, "step": 6}
    found = cells(run)
    assert found["state"] == "finished"
    assert found["accuracy (95%)"] == "80.0% (71.1–86.7)"
    assert found["peak memory"] == "3.0 GB"
    assert found["s/step"] == "0.3"


def test_a_killed_run_reads_as_far_as_it_goes(tmp_path):
    folder = write_run(tmp_path / "a")
    text = (folder / "history.jsonl").read_text()
    (folder / "history.jsonl").write_text(text[: text.index('"step": 4') + 20])
    (run,) = read_runs([folder])
    assert [entry["step"] for entry in run.steps] == [1, 2, 3]
    assert run.remarks == ()
    assert cells(run)["state"] == "not finished"


def test_an_interrupted_run_is_not_finished_though_the_trainer_logged_its_end(tmp_path):
    folder = write_run(tmp_path / "a")
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"step": 6, "train_runtime": 9.0}\n')
    assert cells(read_runs([folder])[0])["state"] == "not finished"
    (folder / "resolved.yaml").unlink()  # of another trainer, which writes no metrics.json
    assert cells(read_runs([folder])[0])["state"] == "finished"


def test_broken_files_are_remarked_and_the_rest_is_read(tmp_path):
    folder = write_run(tmp_path / "a", metrics__json='{"steps": 6, ', environment__json="[1]", resolved__yaml="a: [")
    with (folder / "history.jsonl").open("ab") as file:
        file.write(b'\xff\xfe nothing\n{"step": 7, "loss": 1}\n[3]\n')
    (run,) = read_runs([folder])
    assert [entry["step"] for entry in run.steps] == [*range(1, 7), 7]
    assert run.remarks == (
        "1 lines of history.jsonl cannot be read",
        "resolved.yaml cannot be read",
        "metrics.json cannot be read",
    )


@pytest.mark.parametrize("loss", ["NaN", "null", "Infinity", '"x"'])
def test_a_diverged_run_says_where(tmp_path, loss):
    history = f'{{"step": 1, "loss": 1}}\n{{"step": 2, "loss": {loss}}}\n'
    (run,) = read_runs([write_run(tmp_path / "a", history__jsonl=history)])
    assert run.diverged_at == 2
    assert cells(run)["state"] == "diverged at step 2"
    assert cells(run)["training loss"] == "–"


def test_what_the_trainer_leaves(tmp_path):
    for step in (9, 10):
        checkpoint = tmp_path / f"out/checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        entries = [{"step": n, "loss": 1 / n} for n in range(1, step + 1)]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
        (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (tmp_path / "out/checkpoint-11").mkdir()  # was being written
    (run,) = read_runs([tmp_path / "out"])
    assert len(run.steps) == 10
    assert run.adapter == tmp_path / "out/checkpoint-10"
    assert run.method == "lora"
    assert "checkpoint-10" in run.remarks[0]


def test_names_tell_runs_apart_and_a_folder_counts_once(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a/x", "b/x")]
    assert [run.name for run in read_runs([*folders, tmp_path / "a/../a/x"])] == ["a/x", "b/x"]


def test_what_is_no_run_is_named(tmp_path):
    write_run(tmp_path / "demo/lora")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"demo' is no run: .*demo/lora: name these"):
        read_runs([tmp_path / "demo"])
    with pytest.raises(ConfigError, match="empty' is no run: it has none of"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ConfigError, match=r"there is no folder .*gone"):
        read_runs([tmp_path / "gone"])


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, [], 10**400], ids=lambda value: str(value)[:4])
def test_what_is_no_number(value):
    assert math.isnan(number(value))
