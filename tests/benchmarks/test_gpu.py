"""The benchmark for GPUs, rehearsed on the CPU; and the kernels' machine code, which needs no GPU."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_model, record

ROOT = Path(__file__).parents[2]


def test_a_rehearsal_checks_measures_and_prints_its_tables_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    gpu.main(["--small"])
    printed = capsys.readouterr().out
    assert printed.index("kernels") < printed.index("training steps") < printed.index("measured:")
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    rows = result["rows"]
    assert [row["kernel"] for row in rows if row["part"] == "kernels"].count("W + ΔW") == 1
    methods = [row["method"] for row in rows if row["part"] == "steps"]
    assert methods == list(gpu_model.WAYS) * 2
    assert {"device", "kernels", "cpu"} <= set(result["machine"])
    losses = {row["method"]: row["loss"] for row in rows if row["part"] == "steps"}
    assert len({round(loss, 1) for loss in losses.values()}) == 1


def test_what_no_time_is_left_for_is_said():
    shape = gpu_model.Shape(gpu_model.QV, 64, 96, 1, 4, 2, 128, 16)
    rows = list(gpu_model.run(gpu.torch.device("cpu"), None, shape, 8, 1, late=lambda: True))
    assert {row["note"] for row in rows} == {"not measured: out of time"}
    assert gpu.compared(rows)[0]["× LoRA"] is None


def test_a_wrong_loss_is_refused():
    with pytest.raises(RuntimeError, match="token space"):
        gpu_model.require_equal_loss("randlora, token space", {gpu_model.PEFT_DENSE: 2.0, "randlora, token space": 2.2})


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU that torch sees" in capsys.readouterr().err


COMPILE = """
from benchmarks import gpu_resources
rows = list(gpu_resources.run(quick=True))
assert {row["kernel"] for row in rows} == {name for kinds in gpu_resources.FLAGS.values() for name in kinds}
for row in rows:
    assert row["spilled"] == 0 and row["matrix instr."] > 0 and 0 < row["registers"] <= 255, row
    assert row["shared"] <= 227 * 1024, row
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is for Linux only")
def test_the_kernels_become_matrix_instructions_without_spilling():
    """In a process of its own, where Triton does not interpret; without a device."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "HOME": str(Path.home())}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
