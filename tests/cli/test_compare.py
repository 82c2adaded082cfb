"""`randlora compare` and `randlora train --learning-rate auto`, on tiny models."""

import json
import re

import pytest
import yaml

from cli.helpers import answer, invoke
from randlora.train import compare, search, time_plan
from randlora.train.run import train


@pytest.fixture
def flags(monkeypatch, tmp_path, tiny_bert, reviews):
    """A comparison of two seeds and two rates, all in this process."""
    monkeypatch.setattr(time_plan, "LEAST_SEEDS", 2)
    monkeypatch.setattr(time_plan, "MOST_SEEDS", 2)
    monkeypatch.setattr(search, "MOST", 2)
    monkeypatch.setattr(compare, "seconds_to_start", lambda: 0.0)
    monkeypatch.setattr(compare, "train_in_own_process", lambda run, offline: train(run))
    shape = ["--max-length", 16, "--batch-size", 16, "--max-steps", 4, "--ranks", 8]
    return ["--model", tiny_bert, "--data", reviews, "--output-dir", tmp_path / "out", *shape]


def test_from_the_plan_to_the_report(flags, tmp_path, reviews, monkeypatch):
    flags += ["--methods", "randlora,lora,head", "--other-data", reviews]
    text = invoke("compare", *flags).stdout
    plan, _, end = text.partition("Seed 1 of 2: RandLoRA r=8")
    assert "Then 2 seeds of 4 steps" in plan
    assert "of 60." in plan
    rows = re.findall(r"^ (RandLoRA r=8|LoRA r=2|head alone) .*%.*$", end, re.MULTILINE)
    assert rows == ["RandLoRA r=8", "LoRA r=2", "head alone"]
    assert "neighbours lost" in end
    assert "Does full rank help here?" in end
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert [one["method"] for one in found["methods"]] == rows
    assert all(one["accuracy"]["low"] <= one["accuracy"]["mean"] <= one["accuracy"]["high"] for one in found["methods"])
    assert found["methods"][2]["forgotten"] == pytest.approx([0, 0], abs=0.01)  # whose encoder has not changed
    page = (tmp_path / "out/report.html").read_text()
    assert found["answer"][0].replace("'", "&#39;") in page.replace("&#43;", "+")
    assert (tmp_path / "out/comparison.md").read_text().count("\n| ") >= 4
    assert text.endswith(" minutes\n")

    monkeypatch.setattr(compare, "train", None)  # nothing is left to train
    monkeypatch.setattr(compare, "train_in_own_process", None)
    again = answer("compare", *flags, "--resume")
    assert again["methods"] == found["methods"]
    assert invoke("compare", *flags, "--resume").stdout.endswith(" minutes since --resume\n")  # not of the whole
    assert "go on with it by --resume" in " ".join(invoke("compare", *flags, code=2).output.split())


def test_a_command_that_failed_before_its_plan_can_be_corrected(flags, tmp_path):
    flags += ["--methods", "randlora"]
    assert "no column 'lable'" in invoke("compare", *flags, "--label-column", "lable", code=2).output
    text = invoke("compare", *flags, "--minutes", 1e-6, "--eval-fraction", 0.5, code=2).output
    assert "minutes: 0.0 are left" in text
    invoke("compare", *flags)
    assert json.loads((tmp_path / "out/comparison.json").read_text())["examples"] == 12  # a tenth of 120


def test_a_dry_run_plans_and_leaves_nothing(flags, tmp_path):
    found = answer("compare", *flags, "--methods", "randlora,full", "--dry-run")
    assert found["plan"]["steps"] == 4
    assert set(found["costs"]) == {"randlora-r8", "full"}
    assert not (tmp_path / "out").exists()


def test_a_decided_setting_is_no_flag_and_named_in_a_file(flags, tmp_path):
    assert "--learning-rate" not in invoke("compare", "--help").stdout
    (tmp_path / "run.yaml").write_text("learning_rate: 0.001\nr: 8\n")
    text = invoke("compare", *flags, "--config", tmp_path / "run.yaml", code=2).output
    assert "learning_rate, r: a comparison decides these itself" in " ".join(text.split())


def test_train_finds_its_rate(flags, tmp_path):
    result = invoke("train", *flags[:-2], "--r", 8, "--learning-rate", "auto")
    rate = yaml.safe_load((tmp_path / "out/resolved.yaml").read_text())["learning_rate"]
    assert f"takes {rate:g}" in result.stdout
    assert result.stdout.count("learning rate ") == 2
    assert invoke(
        "train", *flags[:-2], "--r", 8, "--learning-rate", "auto", "--dry-run", "--output-dir", tmp_path / "b"
    )


@pytest.mark.parametrize("rate", ["fast", "-1"])
def test_a_rate_that_is_none_is_named(flags, rate):
    assert f"learning_rate='{rate}'" in invoke("train", *flags[:-2], f"--learning-rate={rate}", code=2).output
