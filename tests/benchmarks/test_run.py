"""The harness end to end on a tiny model; what it measures is nobody's business here."""

import json

import pytest
import torch
from benchmarks.methods import METHODS, PEFT_DENSE
from benchmarks.models import Llama

from benchmarks import __main__, comparison, record, step

TINY = Llama(hidden=32, intermediate=48, layers=1, heads=2, vocab=64, rank=8)


def test_a_quick_run_prints_its_table_and_writes_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(step, "LLAMA_QUICK", TINY)
    __main__.main(["--quick", "step"])
    assert "PEFT RandLora" in capsys.readouterr().out
    result = json.loads((tmp_path / "step-quick.json").read_text())
    assert result["benchmark"] == "step-quick"
    assert set(result) >= {"date", "commit", "machine", "versions", "duration in seconds"}
    assert [row["method"] for row in result["rows"]] == list(METHODS) * 2
    assert all(row["seconds"] > 0 for row in result["rows"])
    assert {row["× frozen"] for row in result["rows"] if row["method"] == "frozen"} == {1.0}


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["no-such"])
    assert "no benchmark no-such" in capsys.readouterr().err


def test_every_name_is_a_benchmark():
    for name in __main__.NAMES:
        benchmark = __import__(f"benchmarks.{name}", fromlist=["run"])
        assert callable(benchmark.run)
        assert len(set(benchmark.COLUMNS)) == len(benchmark.COLUMNS) >= 3


def test_a_method_that_learns_something_else_is_refused():
    with pytest.raises(RuntimeError, match="step 1"):
        comparison.require_equal_losses({"randlora": [2.0, 1.9], PEFT_DENSE: [2.0, 1.8]}, tolerance=1e-3)
    with pytest.raises(RuntimeError, match="nan"):
        comparison.require_equal_losses({"randlora": [float("nan")], PEFT_DENSE: [2.0]}, tolerance=1e-3)


def test_adapters_stay_in_fp32_on_weights_in_bf16():
    rows = comparison.Comparison(TINY, tokens=16, rounds=1, dtype=torch.bfloat16).run()
    assert len(rows) == len(METHODS)
    base = TINY.build().to(torch.bfloat16).requires_grad_(False)
    for name in ("LoRA", "VeRA", PEFT_DENSE, "randlora"):
        model = METHODS[name](comparison.twin(base), TINY)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, name
