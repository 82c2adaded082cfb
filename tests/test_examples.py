"""Each example runs, in small."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from randlora.train.demo import DemoSize

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = DemoSize(train=64, test=16)
RUNS = {
    "classify_reviews": ({"size": SMALL}, "trained parameters"),
    "diffusers_unet": ({"steps": 6}, "largest difference 0.0e+00"),
    "lightning_digits": ({"epochs": 1}, "largest difference 0.0e+00"),
    "sentence_embeddings": ({"size": SMALL}, "largest difference 0.0e+00"),
}


def test_none_is_forgotten():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*RUNS, "timm_vit"}


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    arguments, said = RUNS[name]
    example.main(tmp_path / "output", **arguments)
    assert said in capsys.readouterr().out
    assert list(tmp_path.rglob("*adapter*.safetensors"))


# torchvision's compiled part is for CUDA builds of torch. Its Python part imports once the operators that it describes
# exist.
TIMM = """
import sys
from pathlib import Path
import torch
for operator in ("nms", "qnms"):
    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.insert(0, sys.argv[1])
import timm_vit
timm_vit.main(Path(sys.argv[2]), steps=2, depth=2)
"""


@pytest.mark.aside
def test_timm_runs(tmp_path):
    aside = EXAMPLES.parent / "build" / "timm"
    assert aside.is_dir(), "timm is installed by `make aside`"
    run = subprocess.run(
        [sys.executable, "-c", TIMM, str(EXAMPLES), str(tmp_path / "output")],
        env=os.environ | {"PYTHONPATH": str(aside)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "saved, loaded, merged" in run.stdout, run.stderr
