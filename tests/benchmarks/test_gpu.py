"""The benchmark for GPUs, rehearsed on the CPU; and the kernels' machine code, which needs no GPU."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_clock, gpu_kernels, gpu_model

ROOT = Path(__file__).parents[2]


def test_a_rehearsal_measures_and_ends_with_its_tables_and_json(tmp_path, capsys):
    gpu.main(["--tiny", "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.index("training steps") < printed.index("kernels\n") < printed.index("profile\n")
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    rows = result["rows"]
    assert rows == json.loads(printed.splitlines()[-1])
    assert [row["step"] for row in rows if row["part"] == "kernels"].count("ΔW") == 1
    steps = [row for row in rows if row["part"] == "training steps"]
    assert [row["method"] for row in steps] == list(gpu_model.WAYS) * 2
    assert all(row["ms"] > 0 and row["host ms"] > 0 for row in steps)
    assert len({round(row["loss"], 1) for row in steps}) == 1
    shares = [row["share"] for row in rows if row["part"] == "profile"]
    assert sum(shares) == pytest.approx(1)
    assert {"device", "kernels", "cpu"} <= set(result["machine"])
    plans = [row for row in rows if row["part"] == "plans"]
    assert {row["direction"] for row in plans} == {"forward", "backward"}
    assert all(row["chosen / fastest"] >= 1 for row in plans)


def test_what_no_time_is_left_for_is_said():
    rows = list(gpu_model.run(gpu.torch.device("cpu"), None, gpu_model.Shape(), 8, 1, late=lambda: True))
    assert {row["note"] for row in rows} == {"not measured: out of time"}
    assert gpu.compared(rows)[0]["× LoRA"] is None


def test_every_kind_of_bases_is_measured():
    kinds = {"sparse", "very_sparse", "structured"} & {
        field.name for field in gpu_model.fields(gpu_model.RandLoraConfig)
    }
    assert {f"randlora, {kind.replace('_', ' ')}" for kind in kinds} <= set(gpu_model.WAYS)


@pytest.mark.parametrize("mine", [gpu_model.DENSE, gpu_model.STOCHASTIC])
def test_a_wrong_loss_is_said(mine):
    note = gpu_model.why_wrong(gpu_model.PEFT_DENSE, {mine: 2.2, gpu_model.PEFT_DENSE: 2.0})
    assert mine in (note or "")
    assert gpu_model.why_wrong(gpu_model.PEFT_DENSE, {mine: 2.01, gpu_model.PEFT_DENSE: 2.0}) is None


def test_a_wrong_result_is_a_note_and_the_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_kernels, "TOLERANCE", -1.0)
    rates = gpu_clock.Rates(1e9, 1e9)
    rows = [{"part": "kernels", **row} for row in gpu_kernels.run(torch.device("cpu"), rates, [(24, 16)], 8, 4, 1)]
    found = {part: [] for part in gpu.TABLES} | {"rates": [{"TFLOPs": 1.0, "GB/s": 1.0}], "kernels": rows}
    monkeypatch.setattr(gpu, "measure", lambda *_given: found)
    with pytest.raises(SystemExit, match=f"{len(rows)} wrong results"):
        gpu.main(["--tiny", "--folder", str(tmp_path)])
    assert "wrong: beside torch's result" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU that torch sees" in capsys.readouterr().err


ON_THE_PATH = """
import sys
from importlib import metadata
sys.modules["rich"] = None  # as where nothing but torch, PEFT and Transformers is there
def refuse(name, found=metadata.version):
    if name == "randlora":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = refuse
from benchmarks import gpu, record
assert record._version("randlora") == "not installed"
"""


def test_it_needs_no_installed_package():
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "HOME": str(Path.home())}
    run = subprocess.run(
        [sys.executable, "-c", ON_THE_PATH], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]


COMPILE = """
from benchmarks import gpu_resources
rows = list(gpu_resources.run(quick=True))
assert {row["kernel"] for row in rows} == set(gpu_resources.KERNELS)
for row in rows:
    assert row["spilled"] == 0 and 0 < row["registers"] <= 255, row
    assert (row["matrix instr."] > 0) == (row["kernel"] == gpu_resources.SUM), row
    assert row["shared"] <= 227 * 1024, row
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is for Linux only")
def test_the_kernels_become_machine_code_without_spilling():
    """In a process of its own, where Triton does not interpret; without a device."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "HOME": str(Path.home())}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
