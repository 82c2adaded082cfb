import importlib.util
from pathlib import Path

from randlora.train.demo import DemoSize


def test_the_example_runs(tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "classify_reviews.py"
    spec = importlib.util.spec_from_file_location("classify_reviews", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(tmp_path, DemoSize(train=64, test=16))
    assert "trained parameters" in capsys.readouterr().out
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
