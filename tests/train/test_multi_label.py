"""Any number of labels for a text: metrics against scikit-learn's, the shapes of the data, and a run that is used."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import AutoModelForSequenceClassification

from cli.helpers import answer, invoke
from randlora.errors import ConfigError
from randlora.train.data import load_data, with_task_of_labels
from randlora.train.settings import load_settings
from randlora.train.split import keep_split
from randlora.train.tasks import TASKS
from randlora.train.weighted_loss import balanced_decisions

NAME = "multi-label-classification"
TASK = TASKS[NAME]
LABELS = ["blue", "green", "red"]


def settings(data, **values):
    return load_settings(None, {"model": "m", "data": str(data), "task": NAME, **values})


def cars(count=60):
    draw = np.random.default_rng(0)
    return [(f"car {n}", [label for label in LABELS if draw.random() < 0.4]) for n in range(count)]


def write(path, rows=None):
    rows = cars() if rows is None else rows
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            lines = [(" ".join([text, *labels]), "; ".join(labels)) for text, labels in rows]
            csv.writer(file).writerows([("text", "label"), *lines])
    else:
        path.write_text("".join(json.dumps({"text": text, "label": labels}) + "\n" for text, labels in rows))
    return path


class TestMetrics:
    def test_they_are_those_of_scikit_learn(self):
        draw = np.random.default_rng(0)
        wanted = (draw.random((50, 3)) < [0.2, 0.5, 0.7]).astype(float)
        logits = (2 * wanted - 1 + draw.normal(0, 2, (50, 3))).astype(np.float32)
        guessed = 1 / (1 + np.exp(-logits)) > 0.5
        found = TASK.outcome(logits, wanted, LABELS)
        expected = {
            "micro_f1": f1_score(wanted, guessed, average="micro"),
            "macro_f1": f1_score(wanted, guessed, average="macro"),
            "exact_match": accuracy_score(wanted, guessed),
            "loss": np.mean([log_loss(wanted[:, k], 1 / (1 + np.exp(-logits[:, k].astype(float)))) for k in range(3)]),
        }
        assert found.metrics == pytest.approx(expected, rel=1e-6)
        assert found.by_label["red"] == (wanted[:, 2].sum(), (guessed[:, 2] & (wanted[:, 2] > 0)).sum())
        for low, high in TASK.intervals(logits, wanted).values():
            assert 0 <= low < high <= 1

    def test_the_best_constant_answer(self):
        draw = np.random.default_rng(1)
        wanted = (draw.random((40, 3)) < [0.1, 0.6, 0.5]).astype(float)
        found = TASK.outcome(np.full((40, 3), -1.0), wanted, LABELS).baseline
        answers = [np.tile([a, b, c], (40, 1)) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        assert found.metrics["micro_f1"] == pytest.approx(
            max(f1_score(wanted, one, average="micro", zero_division=0) for one in answers)
        )
        assert found.metrics["exact_match"] == pytest.approx(max(accuracy_score(wanted, one) for one in answers))
        text = TASK.outcome(np.full((40, 3), -1.0), wanted, LABELS).shortfall
        assert "micro_f1 0.0000 is no better than always saying 'green;red'" in text

    def test_nothing_there_and_nothing_said(self):
        found = TASK.outcome(np.full((2, 3), -1.0), np.zeros((2, 3)), LABELS).metrics
        assert (found["micro_f1"], found["macro_f1"], found["exact_match"]) == (0, 0, 1)


class TestData:
    def test_lists_text_and_columns_are_the_same(self, tmp_path):
        rows = cars()
        table = [{"text": text, **{label: int(label in labels) for label in LABELS}} for text, labels in rows]
        Dataset.from_list(table).to_csv(tmp_path / "columns.csv")
        features = Features({"text": Value("string"), "label": List(ClassLabel(names=LABELS))})
        numbers = {"text": [text for text, _ in rows], "label": [[LABELS.index(x) for x in one] for _, one in rows]}
        Dataset.from_dict(numbers, features).save_to_disk(tmp_path / "named")
        found = [
            load_data(settings(write(tmp_path / "lists.jsonl"))),
            load_data(settings(tmp_path / "columns.csv", label_column=LABELS)),
            load_data(settings(tmp_path / "named")),
        ]
        texts = {text: sorted(LABELS.index(one) for one in labels) for text, labels in rows}
        for data in found:
            assert data.labels == LABELS
            assert {row["text"]: row["label"] for part in data[:2] for row in part} == texts
        data = load_data(settings(write(tmp_path / "text.csv")))
        assert data.labels == LABELS
        for row in data.train:
            assert [data.labels[number] for number in row["label"]] == row["text"].split()[2:]
        assert any(row["label"] == [] for row in data.train)

    @pytest.mark.parametrize("given", ["lists", "columns"])
    def test_lists_and_several_columns_make_it_the_task(self, tmp_path, given):
        values = {"label_column": LABELS} if given == "columns" else {}
        found = settings(write(tmp_path / "d.jsonl"), **values).model_copy(update={"task": "sequence-classification"})
        with pytest.warns(UserWarning, match=f"make this a task='{NAME}'"):
            assert with_task_of_labels(found).task == NAME

    def test_rare_labels_are_on_both_sides(self, tmp_path):
        rows = [(f"t {n}", ["often", *(["rare"] if n % 10 == 0 else [])]) for n in range(100)]
        data = load_data(settings(write(tmp_path / "d.jsonl", rows), eval_fraction=0.2))
        assert Counter(label for labels in data.evaluation["label"] for label in labels) == {0: 20, 1: 2}

    @pytest.mark.parametrize(
        ("rows", "values", "expected"),
        [
            ([("a", ["x", "x"])], {}, r"row 0 of .* has the labels \['x', 'x'\]: a list names each label once"),
            ([("a", [0, 1, 0])], {}, "columns of 0 and 1 are named one by one by label_column"),
            ([("a", ["x"]), ("b", None)], {}, "no 'label' in 1 of its rows, first in row 1"),
            ([("a", ["x"]), ("b", ["y"])], {}, "no row of the training data has several labels"),
            ([("a", 2)], {"label_column": ["label", "text"]}, "row 0 of .* has 2 in 'label': 0 or 1 is needed"),
            ([("a", ["x"])], {"label_column": ["no", "such"]}, "has no column 'no'"),
        ],
    )
    def test_what_is_refused(self, tmp_path, rows, values, expected):
        with pytest.raises(ConfigError, match=expected):
            load_data(settings(write(tmp_path / "d.jsonl", rows), **values))

    def test_a_split_that_is_kept_reads_the_same(self, tmp_path):
        chosen = settings(write(tmp_path / "d.jsonl"))
        one, other = load_data(chosen), load_data(keep_split(chosen, tmp_path / "kept"))
        assert one.labels == other.labels
        assert one.train.to_list() == other.train.to_list()


def test_weights_are_those_of_pytorch():
    given = [[0], [0, 1], [0], []]
    loss, logits = balanced_decisions(given, 3), torch.randn(4, 3, requires_grad=True)
    targets = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    peer = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1 / 3, 3.0, 1.0]))
    assert torch.allclose(loss({"logits": logits}, targets), peer(logits, targets))
    with torch.no_grad():
        assert torch.allclose(loss({"logits": logits}, targets), torch.nn.BCEWithLogitsLoss()(logits, targets))
    parts = [loss({"logits": logits[rows]}, targets[rows], 4) for rows in (slice(3), slice(3, 4))]
    assert torch.allclose(sum(parts), peer(logits, targets))


def test_a_run_is_scored_used_merged_and_shown(tiny_bert, tmp_path):
    data = write(tmp_path / "cars.csv")
    flags = ["--model", tiny_bert, "--data", data, "--task", NAME, "--class-weights", "balanced", "--r", 8]
    flags += ["--max-steps", 8, "--batch-size", 8, "--max-length", 16, "--learning-rate", 1e-2, "--report-to", "none"]
    answer("train", *flags, "--output-dir", tmp_path / "run")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    exact = np.mean([row["label"] == row["predicted"] for row in rows])
    assert metrics["eval_exact_match"] == pytest.approx(exact)
    found = answer("eval", tmp_path / "run")["adapter"]
    assert found["micro_f1"] == pytest.approx(metrics["eval_micro_f1"])
    assert "always saying" in invoke("eval", tmp_path / "run").stdout

    (one,) = answer("predict", tmp_path / "run", "car 3 red blue")["predictions"]
    assert list(one["probabilities"]) == LABELS
    assert one["labels"] == [name for name, share in one["probabilities"].items() if share > 0.5]
    invoke("predict", tmp_path / "run", "--data", data, "--output", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert all(set(line["predicted"].split(";")) <= {*LABELS, ""} for line in lines)
    assert all(0.5 <= float(line["confidence"]) <= 1 for line in lines)

    invoke("merge", tmp_path / "run", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == dict(enumerate(LABELS))
    again = answer("eval", tmp_path / "merged", "--data", data)["adapter"]
    assert again["task"] == NAME
    assert again["exact_match"] == answer("eval", tmp_path / "run", "--data", data)["adapter"]["exact_match"]

    page = tmp_path / "report.html"
    invoke("report", tmp_path / "run", "--output", page)
    text = page.read_text()
    assert "Label by label" in text
    assert "What was taken for what" not in text
    assert ">micro-F1</button>" in text
    assert 'problem_type="multi_label_classification"' in answer("push", tmp_path / "run", "me/x", "--dry-run")["card"]
