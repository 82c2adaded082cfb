"""GPTQ and AWQ, by the package that makes and runs both: quantised here, loaded by Transformers, adapted, trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import llama

SCRIPT = Path(__file__).with_name("calibrated_run.py")
ASIDE = Path(__file__).parents[2] / "build" / "gptqmodel"  # its latest release asks for a newer torch than it needs


@pytest.mark.aside
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_calibrated_model_is_adapted_trained_saved_and_refuses_to_merge(method, tokenizer, tmp_path):
    assert ASIDE.is_dir(), "gptqmodel is installed by `make aside`"
    source = tmp_path / "base"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_key_value_heads": 2}
    llama(vocab_size=len(tokenizer), **sizes).save_pretrained(source)
    tokenizer.save_pretrained(source)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), method, str(source), str(tmp_path)],
        # with one worker, its default for two cores, the package does not start; its compiled packing takes a minute
        env=os.environ | {"PYTHONPATH": str(ASIDE), "GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_DISABLE_PACK_EXT": "1"},
        cwd=tmp_path,  # where it leaves its log
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kinds"] == ["QuantizedLinear"]
    assert method == "gptq" or "Awq" in report["base"]
    assert report["start"] == 0
    assert report["losses"][-1] < report["losses"][0] - 0.1
    assert report["layers"] < 2e-3  # float16
    assert report["learned"] > 0.1
    assert report["reloaded"] < 2e-2 * report["learned"]
    assert "cannot be written back" in report["refusal"]
    assert report["unloaded"] == 0
