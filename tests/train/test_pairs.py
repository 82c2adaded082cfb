"""Pairs of texts: both columns are known to all that reads them."""

import csv
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cli.helpers import answer, invoke
from randlora.errors import ConfigError
from randlora.report.comparison import Comparison, Method
from randlora.report.runs import read_runs
from randlora.train.data import load_data
from randlora.train.forgetting import Forgetting
from randlora.train.settings import load_settings
from randlora.train.split import keep_split
from randlora.train.tasks import TASKS

COLUMNS = ["--input-column", "premise", "--input-column", "hypothesis"]
WORDS = {"good": "great", "bad": "awful"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Whether both texts are of one mind."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    rows = [
        (f"{one} film {n}", f"{WORDS[other]} evening", "same" if one == other else "other")
        for n in range(12)
        for one in WORDS
        for other in WORDS
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("premise", "hypothesis", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert, pairs):
    folder = tmp_path_factory.mktemp("run")
    flags = ["--model", tiny_bert, "--data", pairs, *COLUMNS, "--r", 8, "--max-steps", 4, "--batch-size", 8]
    answer("train", *flags, "--max-length", 24, "--report-to", "none", "--output-dir", folder)
    return folder


def settings(data, **values):
    columns = {"input_column": ["premise", "hypothesis"]}
    return load_settings(None, {"model": "m", "data": str(data), "max_length": 24, **columns, **values})


def test_they_are_tokens_of_a_pair(pairs, tokenizer):
    data = load_data(settings(pairs))
    row = data.train[0]
    assert list(row) == ["text", "text_pair", "label"]
    prepared = TASKS["sequence-classification"].prepare(data.train, tokenizer, settings(pairs))[0]
    expected = tokenizer(row["text"], row["text_pair"])
    assert prepared["input_ids"] == expected["input_ids"]
    assert prepared["token_type_ids"] == expected["token_type_ids"]
    assert set(prepared["token_type_ids"]) == {0, 1}


def test_a_split_keeps_copies_of_a_pair_together_and_can_be_kept(pairs, tmp_path):
    chosen = settings(pairs, eval_fraction=0.3)
    data = load_data(chosen)
    both = [{(row["text"], row["text_pair"]) for row in part} for part in data[:2]]
    assert not both[0] & both[1]
    kept = keep_split(chosen, tmp_path / "kept")
    assert kept.input_column == ["text", "text_pair"]
    assert load_data(kept).train.to_list() == data.train.to_list()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"input_column": ["a", "b", "c"]}, "two columns, for sequence-classification, regression"),
        ({"input_column": ["a", "a"]}, "two columns"),
        ({"task": "causal-lm"}, "two columns"),
        ({"label_column": ["a", "b"], "task": "regression"}, "different columns of 0 and 1"),
    ],
)
def test_columns_that_no_task_reads(values, expected):
    with pytest.raises(ConfigError, match=expected):
        settings("d.csv", **values)


def test_the_second_column_is_checked_too(tmp_path, pairs):
    with pytest.raises(ConfigError, match="has no column 'answer'"):
        load_data(settings(pairs, input_column=["premise", "answer"]))
    rows = [{"premise": "a", "hypothesis": other, "label": 1} for other in ("b", None)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="no 'hypothesis' in 1 of its rows, first in row 1"):
        load_data(settings(tmp_path / "d.jsonl"))


def test_eval_and_predict_read_both(run, pairs, tmp_path):
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    assert answer("eval", run)["adapter"]["loss"] == pytest.approx(metrics["eval_loss"], abs=1e-4)
    assert answer("eval", run, "--data", pairs)["adapter"]["examples"] == 48
    found = answer("predict", run, "good film 3", "awful evening", "bad", "great")["predictions"]
    assert [(one["text"], one["text_pair"]) for one in found] == [("good film 3", "awful evening"), ("bad", "great")]
    line = invoke("predict", run, stdin="good film 3\tawful evening\n").stdout.rstrip("\n").split("\t")
    assert line[0] == found[0]["label"]
    assert line[2:] == ["good film 3", "awful evening"]
    invoke("predict", run, "--data", pairs, "--output", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["premise", "hypothesis", "label", "predicted", "confidence"]
    assert "3 texts are no pairs" in invoke("predict", run, "a", "b", "c", code=2).output
    assert "parted by a tab" in invoke("predict", run, stdin="alone\n", code=2).output.replace("\n", " ")


def test_a_merged_model_reads_pairs_where_both_columns_are_named(run, pairs, tmp_path):
    invoke("merge", run, tmp_path / "merged")
    (one,) = answer("predict", tmp_path / "merged", "good film 3", "awful evening", *COLUMNS)["predictions"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        logits = model(**tokenizer("good film 3", "awful evening", return_tensors="pt")).logits[0]
    assert list(one["probabilities"].values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
    found = answer("eval", tmp_path / "merged", "--data", pairs, *COLUMNS)["adapter"]
    assert found["loss"] == pytest.approx(answer("eval", run, "--data", pairs)["adapter"]["loss"], abs=1e-5)


def test_the_report_the_card_and_a_comparison_know_both(run, pairs, tmp_path):
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert {"text", "text_pair", "label", "predicted"} <= rows[0].keys()
    invoke("report", run, "--output", tmp_path / "report.html")
    assert f"{rows[0]['text']} | {rows[0]['text_pair']}" in (tmp_path / "report.html").read_text()
    card = answer("push", run, "me/x", "--dry-run")["card"]
    assert "It reads pairs of texts, `premise` and `hypothesis`" in card
    (one,) = read_runs([run])
    comparison = Comparison([Method("RandLoRA r=8", 1e-3, True, 1, (one,))])
    right = [row["label"] == row["predicted"] for row in rows]
    assert comparison.score(comparison.methods[0]).mean == pytest.approx(np.mean(right))


def test_forgetting_reads_the_first_of_both(pairs, tiny_bert):
    assert len(Forgetting(settings(pairs, model=tiny_bert), str(pairs))) == 48
