"""Each example runs, in small."""

import importlib.util
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
    "timm_vit": ({"steps": 2, "depth": 2}, "saved, loaded, merged"),
}


def test_none_is_forgotten():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    arguments, said = RUNS[name]
    example.main(tmp_path / "output", **arguments)
    assert said in capsys.readouterr().out
    assert list(tmp_path.rglob("*adapter*.safetensors"))
