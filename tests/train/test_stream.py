"""Training data that is read while training: the same rows, none kept, none that evaluates."""

import gzip
import json
from itertools import islice

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from safetensors.torch import load_file

from cli.helpers import answer, invoke
from randlora.errors import ConfigError
from randlora.train import stream
from randlora.train.compare_settings import CompareSettings
from randlora.train.data import load_data, with_task_of_labels
from randlora.train.run import train
from randlora.train.settings import load_settings, read_settings
from randlora.train.stream import Prepared, as_stream

ROWS = [{"text": f"{'good' if n % 2 else 'bad'} text {n}", "label": ["no", "yes"][n % 2]} for n in range(60)]


def settings(data, **values):
    common = {"model": "m", "data": str(data), "streaming": True, "max_steps": 4, "max_eval_samples": 10}
    return load_settings(None, {**common, **values})


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif ".csv" in path.suffixes or path.suffix == ".tsv":
        between = "\t" if path.suffix == ".tsv" else ","
        text = f"text{between}label\n" + "".join(f"{row['text']}{between}{row['label']}\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(tokenizer, data, epoch=0):
    """The texts of a pass, as the tokenizer writes them."""
    rows = data.train.examples(tokenizer, epoch)
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.csv.gz", "d.jsonl", "d.parquet"])
def test_a_pass_has_every_row_once_but_for_those_that_evaluate(tmp_path, tokenizer, name):
    data = load_data(settings(write(tmp_path / name)))
    assert data.labels == ["no", "yes"]
    first, again, second = (words(tokenizer, data, epoch) for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(first) == sorted(second)
    assert first != sorted(first, key=lambda text: int(text.split()[-1]))
    held_out = list(data.evaluation["text"])
    assert len(held_out) == 10
    assert sorted([*first, *held_out]) == sorted(row["text"] for row in ROWS)


def test_labels_go_with_their_texts(tmp_path, tokenizer):
    data = load_data(settings(write(tmp_path / "d.csv")))
    for row in islice(Prepared(data.train, tokenizer), 130):  # more than two passes
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert data.labels[row["label"]] == ROWS[int(text.split()[-1])]["label"]


def test_splits_names_of_labels_and_limits(tmp_path, tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    parts = {
        name: Dataset.from_dict(
            {"text": [f"{name} {n}" for n in range(30)], "label": [n % 2 for n in range(30)]}, features
        )
        for name in ("train", "validation")
    }
    DatasetDict(parts).save_to_disk(tmp_path / "d")
    data = load_data(settings(tmp_path / "d", max_samples=7))
    assert data.labels == ["a", "b", "c"]
    assert sorted(words(tokenizer, data)) == sorted(words(tokenizer, data, 1)) == [f"train {n}" for n in range(7)]
    assert list(data.evaluation["text"]) == [f"validation {n}" for n in range(10)]
    here = load_data(settings(write(tmp_path / "t.csv"), eval_data=str(write(tmp_path / "e.csv", ROWS[:4]))))
    assert (len(here.evaluation), len(words(tokenizer, here))) == (4, 60)


def test_no_more_is_read_than_the_window_and_a_block(tokenizer, monkeypatch):
    monkeypatch.setattr(stream, "_WINDOW", 20)
    monkeypatch.setattr(stream, "_BLOCK", 10)
    read = []

    def endless():
        number = 0
        while True:
            read.append(number)
            yield {"text": f"text {number}", "label": number % 2}
            number += 1

    names = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    found = as_stream(IterableDataset.from_generator(endless, features=names), "hub/data", settings("hub/data"))
    found = found.named(local=False)  # without a pass: the data names its labels
    found, evaluation = found.without_evaluation(5)
    read.clear()
    examples = list(islice(Prepared(found, tokenizer), 3))
    assert len(examples) == 3
    assert len(evaluation) == 5
    assert len(read) <= 5 + 20 + 10 + 1


def test_labels_that_only_a_pass_over_a_download_would_tell(tokenizer):
    rows = IterableDataset.from_generator(lambda: iter(ROWS))
    with pytest.raises(ConfigError, match="does not name its labels, and to find them everything would have to be"):
        as_stream(rows, "hub/data", settings("hub/data")).named(local=False)


def test_rare_labels_are_found_and_bad_rows_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BLOCK", 10)
    rare = [*ROWS, {"text": "odd", "label": "perhaps"}]
    assert load_data(settings(write(tmp_path / "d.jsonl", rare))).labels == ["no", "perhaps", "yes"]
    with pytest.raises(ConfigError, match="no 'label' in 1 of its rows"):
        load_data(settings(write(tmp_path / "e.jsonl", [*ROWS, {"text": "odd", "label": None}])))
    with pytest.raises(ConfigError, match="has no column 'label'"):
        load_data(settings(write(tmp_path / "f.jsonl", [{"text": "a"}] * 3)))


def test_a_stream_that_all_evaluates_is_refused(tmp_path, tokenizer):
    data = load_data(settings(write(tmp_path / "d.csv"), max_eval_samples=None))
    with pytest.raises(ConfigError, match="is left to train on: lower max_eval_samples"):
        next(iter(Prepared(data.train, tokenizer)))


def test_the_task_is_found_in_the_first_rows(tmp_path):
    rows = [{"text": f"t {n}", "label": n / 7} for n in range(40)]
    with pytest.warns(UserWarning, match="make this a task='regression'"):
        found = with_task_of_labels(settings(write(tmp_path / "d.jsonl", rows)))
    assert found.task == "regression"
    assert load_data(found).train.labels == ("label",)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_steps": None}, "streaming=True needs max_steps"),
        ({"class_weights": "balanced"}, "streaming=True: class_weights"),
        ({"learning_rate": "auto"}, "streaming=True: learning_rate='auto'"),
        ({"eval_fraction": 0.5}, "eval_fraction=0.5 of a stream is not known"),
        ({"best": "accuracy"}, "streaming=True with best='accuracy' needs eval_steps"),
    ],
)
def test_what_a_stream_cannot(values, expected):
    with pytest.raises(ConfigError, match=expected):
        settings("d.csv", **values)


def test_a_comparison_keeps_its_data():
    with pytest.raises(ConfigError, match="streaming=True: a comparison keeps its data"):
        read_settings(CompareSettings, None, {"model": "m", "data": "d", "streaming": True, "max_steps": 3})


def test_a_run_goes_on_where_it_was(tiny_bert, tmp_path):
    """From a checkpoint in its second pass, as if it had not been interrupted."""
    common = {"model": tiny_bert, "r": 8, "batch_size": 8, "max_length": 16, "report_to": "none", "max_steps": 12}
    common |= {"save_steps": 9, "learning_rate": 1e-2}
    here = settings(write(tmp_path / "d.csv"), **common, output_dir=str(tmp_path / "whole"))
    whole = train(here)
    half = tmp_path / "whole/checkpoints/checkpoint-9"
    again = train(here.model_copy(update={"resume": str(half), "output_dir": str(tmp_path / "again")}))
    assert (whole.steps, again.steps) == (12, 12)
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    found = answer("eval", tmp_path / "whole")["adapter"]
    assert (found["examples"], found["accuracy"]) == (10, pytest.approx(whole.metrics["eval_accuracy"]))


def test_texts_are_packed_and_a_dry_run_reads_no_more_than_it_must(tiny_llama, tmp_path):
    (tmp_path / "d.txt").write_text("".join(f"line number {n} of the text\n" for n in range(60)))
    flags = ["--model", tiny_llama, "--data", tmp_path / "d.txt", "--task", "causal-lm", "--streaming", "--r", 8]
    flags += ["--max-steps", 3, "--max-eval-samples", 10, "--max-length", 16, "--batch-size", 4]
    flags += ["--report-to", "none", "--output-dir", tmp_path / "run"]
    assert "on a stream of examples, evaluated on 10" in invoke("train", *flags, "--dry-run").stdout
    assert answer("train", *flags)["steps"] == 3
