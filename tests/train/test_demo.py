import csv
import json
import subprocess
import sys

import pytest

from randlora.analysis.counts import matched_lora_rank
from randlora.errors import ConfigError
from randlora.train import demo, pace


def read(path):
    with path.open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def test_sentences_are_real_seeded_and_never_in_both_parts(tmp_path):
    parts = [demo.write_sentences(tmp_path / name, pace.WHOLE, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
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
    size = pace.DemoSize(train=128, test=16)  # four steps, of which the first warms up
    said = []
    result = demo.run_demo(tmp_path, size, 0, said.append)
    assert [text[:6] for text in said[1:6]] == [f"{number} of 5" for number in range(1, 6)]
    assert all("left for all" in text for text in said[2:])
    assert list(result.runs) == ["RandLoRA", "RandLoRA, structured", "LoRA", "full fine-tuning", "head alone"]
    assert result.verification.holds
    assert result.verification.examples == 16
    counts = {name: run["trainable_parameters"] for name, run in result.runs.items()}
    assert counts["head alone"] < counts["RandLoRA"] < counts["full fine-tuning"] / 50
    assert abs(counts["RandLoRA"] - counts["LoRA"]) < 0.1 * counts["RandLoRA"]
    rank = {name: sum(value > 1e-5 * values[0] for value in values) for name, values in result.spectra.items()}
    assert rank["LoRA"] == 4
    assert rank["RandLoRA"] > 100
    assert rank["RandLoRA, structured"] > 100


class TestPace:
    SHARES = (1.0, 0.5)

    @pytest.mark.parametrize("step", [0.3, 1.0, 5.0])
    def test_what_is_taken_fits_and_one_more_would_not(self, step):
        found = pace.Pace(start=10, step=step)
        size = found.fitting(480, self.SHARES)
        more = pace.DemoSize(size.train + 320, size.test)
        assert found.seconds(size, self.SHARES) <= 480 or size.train == 320
        assert found.seconds(more, self.SHARES) > 480 or size == pace.WHOLE

    def test_a_fast_machine_takes_all_and_a_slow_one_the_least(self):
        assert pace.Pace(1, 0.01).fitting(480, self.SHARES) == pace.WHOLE
        assert pace.Pace(300, 60).fitting(480, self.SHARES) == pace.QUICK

    def test_the_rest_takes_as_the_parts_before_did(self, monkeypatch):
        now = iter([0.0, 600.0])
        monkeypatch.setattr(pace.time, "monotonic", lambda: next(now))
        clock = pace.Clock([60, 120, 60], exact=True)
        assert "about 4 minutes left" in clock.left(0)
        assert "about 30 minutes left" in clock.left(1)  # the first took ten times what was expected

    def test_first_steps_are_timed_and_leave_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(demo, "train_in_own_process", lambda settings: {"seconds_per_step": 2.0})
        assert demo.measure_pace(tmp_path / "pace", 0, str).step == 2.0
        assert not (tmp_path / "pace").exists()


def test_verification_prints_json_in_a_process_of_its_own(tmp_path, tiny_bert, reviews):
    from randlora.train.run import train
    from randlora.train.settings import load_settings

    values = {"model": tiny_bert, "data": reviews, "output_dir": str(tmp_path), "r": 8, "max_steps": 2}
    train(load_settings(None, values))
    process = subprocess.run(
        [sys.executable, "-m", "randlora.train.verify", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert json.loads(process.stdout)["same_labels"] is True
