"""Labels of which some are rare: what is said of a classifier that knows the largest alone, and what helps."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional

from cli.helpers import answer, invoke
from randlora.errors import ConfigError
from randlora.report.confusion import confusion
from randlora.train.data import load_data
from randlora.train.settings import load_settings
from randlora.train.tasks import TASKS
from randlora.train.weighted_loss import balanced_loss

LABELS = ["bad", "fine", "good"]


def outcome(targets, guessed, labels=LABELS):
    logits = 4.0 * np.eye(len(labels))[guessed]
    return TASKS["sequence-classification"].outcome(logits, np.array(targets), labels)


class TestOutcome:
    def test_f1_and_what_was_taken_for_what(self):
        found = outcome([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0])
        assert found.confusion == ((1, 1, 0), (0, 1, 0), (1, 0, 2))
        f1 = [2 * 1 / (2 + 2), 2 * 1 / (1 + 2), 2 * 2 / (3 + 2)]  # 2·hits / (those there + those predicted)
        assert found.metrics["macro_f1"] == pytest.approx(sum(f1) / 3)
        assert found.majority == ("good", 0.5)
        assert found.shortfall == ""

    def test_one_label_for_all(self):
        found = outcome([0, 1, 2, 2, 2], [2] * 5)
        assert found.metrics["accuracy"] == 0.6
        assert "every example was labelled 'good'" in found.shortfall
        assert "'good', which 60.0% of the examples are" in found.shortfall

    def test_no_better_than_the_most_frequent(self):
        assert "accuracy 50.0% is no better than" in outcome([0, 1, 2, 2], [0, 0, 2, 1]).shortfall

    @pytest.mark.parametrize(("targets", "guessed"), [([0, 0, 0], [0, 0, 0]), ([0, 1, 2], [0, 1, 1])])
    def test_nothing_is_said_of_one_label_alone_or_of_something_learnt(self, targets, guessed):
        assert outcome(targets, guessed).shortfall == ""

    def test_the_report_says_the_same_from_the_predictions(self):
        examples = [{"label": LABELS[a], "predicted": LABELS[b]} for a, b in zip([0, 1, 2, 2, 2], [2] * 5, strict=True)]
        found = confusion(examples)
        assert found.labels == ("bad", "fine", "good")
        assert found.counts == outcome([0, 1, 2, 2, 2], [2] * 5).confusion
        assert "accuracy 60.0% is no better than always saying 'good'" in found.remark
        assert confusion([{"text": "a", "loss": 1.0}]) is None


def test_the_split_has_every_label_in_its_share(tmp_path):
    rows = [f"{label} {n},{label}\n" for label, count in (("a", 70), ("b", 20), ("c", 10)) for n in range(count)]
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(rows))
    data = load_data(load_settings(None, {"model": "m", "data": str(tmp_path / "d.csv"), "eval_fraction": 0.1}))
    assert Counter(data.evaluation["label"]) == {0: 7, 1: 2, 2: 1}


class TestWeights:
    TARGETS = (0, 0, 0, 0, 0, 1, 1, 2)

    def test_labels_count_the_same_in_training_and_an_evaluation_is_not_weighted(self):
        logits, targets = torch.randn(8, 3, requires_grad=True), torch.tensor(self.TARGETS)
        loss = balanced_loss(self.TARGETS, 3)
        each = functional.cross_entropy(logits, targets, reduction="none")
        by_label = torch.stack([each[targets == label].mean() for label in range(3)])
        assert torch.allclose(loss({"logits": logits}, targets), by_label.mean())
        with torch.no_grad():
            assert torch.allclose(loss({"logits": logits}, targets), each.mean())

    def test_parts_of_a_step_add_up_to_it(self):
        logits, targets = torch.randn(8, 3, requires_grad=True), torch.tensor(self.TARGETS)
        loss = balanced_loss(self.TARGETS, 3)
        parts = [
            loss({"logits": logits[rows]}, targets[rows], num_items_in_batch=8) for rows in (slice(5), slice(5, 8))
        ]
        assert torch.allclose(sum(parts), loss({"logits": logits}, targets))

    def test_they_are_for_one_label_of_an_example(self):
        with pytest.raises(ConfigError, match="class_weights='balanced' is for one label"):
            load_settings(None, {"model": "m", "data": "d", "task": "causal-lm", "class_weights": "balanced"})


def test_a_run_is_scored_label_by_label_and_says_if_it_tells_nothing_apart(tiny_bert, tmp_path):
    rows = "".join(f"word {n},{'rare' if n % 4 == 0 else 'often'}\n" for n in range(40))
    (tmp_path / "d.csv").write_text(f"text,label\n{rows}")
    steps = ["--r", 8, "--max-steps", 2, "--batch-size", 8, "--max-length", 16, "--report-to", "none"]
    flags = ["--model", tiny_bert, "--data", tmp_path / "d.csv", "--eval-fraction", 0.5, *steps]
    flags += ["--class-weights", "balanced", "--gradient-accumulation", 2, "--output-dir", tmp_path / "run"]
    said = invoke("train", *flags).stderr
    found = answer("eval", tmp_path / "run")["adapter"]
    assert sum(map(sum, found["confusion"])) == 20
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    assert found["macro_f1"] == pytest.approx(metrics["eval_macro_f1"])
    text = invoke("eval", tmp_path / "run").stdout
    assert "has ↓ was given →" in text
    apart = sum(any(row[column] for row in found["confusion"]) for column in range(2)) == 2
    assert ("every example was labelled" in said) == ("every example was labelled" in text) == (not apart)
