"""kill -9, full disks, missing rights and two writers: whatever was whole before is whole afterwards."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli.conftest import save_adapter
from randlora import PeftModel, RandLoraError
from randlora.convert import compact_adapter, convert_folder_to_lora, save_merged
from randlora.train import run
from randlora.train.settings import load_settings
from tuner.helpers import adapted, output, stack

from .children import SLOW, ended_well, killed, seconds_of, start, without_rights, without_space

WEIGHTS = "adapter_model.safetensors"
KILLS = 40 if SLOW else 4
counted: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    torch.set_num_threads(1)  # a forked process has none of the threads of its parent
    yield
    print(f"\nfaults: {dict(counted)}")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_llama) -> Path:
    return save_adapter(tiny_llama, tmp_path_factory.mktemp("good"), target_modules=["q_proj", "k_proj"])


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that others may look into; those of pytest are its user's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def loaded(folder: Path) -> bytes:
    return output(PeftModel.from_pretrained(stack(), folder)).detach().numpy().tobytes()


def outputs(*models: PeftModel) -> set[bytes]:
    return {output(model).detach().numpy().tobytes() for model in models}


def logits(base: str, folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def count(kind: str, midway: bool) -> None:
    counted[f"kills of {kind}" if midway else f"{kind}, ended before the kill"] += 1


class TestKilled:
    def test_saving(self, tmp_path):
        models = [adapted(seed=3), adapted(seed=4)]
        models[0].save_pretrained(tmp_path)
        within = seconds_of(lambda _: models[0].save_pretrained(tmp_path))
        for number in range(KILLS):
            midway = killed(lambda number=number: models[number % 2].save_pretrained(tmp_path), within)
            count("a save", midway)
            assert loaded(tmp_path) in outputs(*models)

    def test_compacting_in_place(self, adapter, tiny_llama, tmp_path):
        expected = logits(tiny_llama, adapter)
        within = seconds_of(lambda number: compact_adapter(shutil.copytree(adapter, tmp_path / f"whole{number}")))
        for number in range(KILLS):
            folder = shutil.copytree(adapter, tmp_path / str(number))
            count("a conversion", killed(lambda folder=folder: compact_adapter(folder), within))
            assert torch.equal(logits(tiny_llama, folder), expected)

    def test_converting_to_lora(self, adapter, tiny_llama, tmp_path):
        def convert(target):
            convert_folder_to_lora(adapter, target, energy=1.0)

        within = seconds_of(lambda number: convert(tmp_path / f"whole{number}"))
        expected = logits(tiny_llama, tmp_path / "whole0")
        for number in range(KILLS):
            target = tmp_path / str(number)
            count("a conversion", killed(lambda target=target: convert(target), within))
            if not target.exists():
                convert(target)  # what the killed one left does not stand in the way
            assert torch.equal(logits(tiny_llama, target), expected)

    def test_merging(self, adapter, tiny_llama, tmp_path):
        def merge(target):
            save_merged(adapter, target, base_model_path=tiny_llama, max_shard_size=50_000)

        within = seconds_of(lambda number: merge(tmp_path / f"whole{number}"))
        expected = bytes_of(tmp_path / "whole0")
        for number in range(KILLS):
            target = tmp_path / str(number)
            count("a merge", killed(lambda target=target: merge(target), within))
            if not target.exists():
                merge(target)
            assert bytes_of(target) == expected

    def test_training_goes_on_to_the_same_weights(self, tiny_bert, reviews, tmp_path):
        def train(name):
            steps = {"r": 8, "batch_size": 16, "max_length": 16, "max_steps": 12, "save_steps": 2}
            values = {"model": tiny_bert, "data": reviews, "output_dir": str(tmp_path / name), **steps}
            run.train(load_settings(None, values | {"resume": "auto"}))

        within = seconds_of(lambda number: train(f"whole{number}"))
        for number in range(10 if SLOW else 1):
            midway = 0
            while midway < (3 if SLOW else 2):  # each run is killed several times
                alive = killed(lambda number=number: train(str(number)), 0.6 * within)
                count("a training run", alive)
                midway += 1
            assert ended_well(start(lambda number=number: train(str(number))))
            expected, found = (load_file(tmp_path / name / "adapter" / WEIGHTS) for name in ("whole0", str(number)))
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected)


def refused(work, *kinds: type[Exception]):
    """``work`` that must end with one of these errors, and with no half-written file left behind."""

    def checked() -> None:
        with pytest.raises(kinds):
            work()

    return checked


class TestNoSpace:
    @pytest.mark.parametrize("bytes_left", [0, 100, 1000])
    def test_saving(self, tmp_path, bytes_left):
        old = adapted(seed=3)
        old.save_pretrained(tmp_path)
        before = bytes_of(tmp_path)
        save = refused(lambda: adapted(seed=4).save_pretrained(tmp_path), OSError)
        assert ended_well(start(without_space(save, bytes_left)))
        after = bytes_of(tmp_path)
        assert after.keys() == before.keys()
        assert after[WEIGHTS] == before[WEIGHTS]
        assert loaded(tmp_path) in outputs(old)

    def test_converting_and_merging(self, adapter, tiny_llama, tmp_path):
        before = bytes_of(adapter)
        work = [
            lambda: compact_adapter(adapter),
            lambda: compact_adapter(adapter, tmp_path / "compact"),
            lambda: convert_folder_to_lora(adapter, tmp_path / "lora", rank=2),
            lambda: save_merged(adapter, tmp_path / "merged", base_model_path=tiny_llama),
        ]
        for do in work:
            assert ended_well(start(without_space(refused(do, OSError))))
        assert bytes_of(adapter) == before
        assert not list(tmp_path.iterdir())


class TestNoRights:
    def test_a_folder_that_may_not_be_written(self, place):
        for _ in range(2):  # what that imports may not be readable afterwards
            adapted(seed=3, target_modules=["tall", "square"]).save_pretrained(place / "adapter")
        loaded(place / "adapter")
        before = bytes_of(place / "adapter")
        for path in (*(place / "adapter").iterdir(), place / "adapter"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        save = refused(lambda: adapted(seed=4).save_pretrained(place / "adapter"), PermissionError)
        assert ended_well(start(without_rights(save)))
        assert ended_well(start(without_rights(refused(lambda: compact_adapter(place / "adapter"), PermissionError))))
        assert bytes_of(place / "adapter") == before
        assert ended_well(start(without_rights(lambda: loaded(place / "adapter"))))

    def test_a_file_that_may_not_be_read(self, place):
        adapted(seed=3).save_pretrained(place / "adapter")
        (place / "adapter" / WEIGHTS).chmod(0)
        load = refused(lambda: loaded(place / "adapter"), PermissionError)
        assert ended_well(start(without_rights(load)))


class TestTwoWriters:
    def test_of_one_kind_leave_one_whole_winner(self, tmp_path):
        models = [adapted(seed=3), adapted(seed=4)]
        models[0].save_pretrained(tmp_path)

        def save(model):
            for _ in range(50 if SLOW else 10):
                model.save_pretrained(tmp_path)

        writers = [start(lambda model=model: save(model)) for model in models]
        for _ in range(50 if SLOW else 10):  # whoever reads meanwhile gets one of them
            assert loaded(tmp_path) in outputs(*models)
            counted["loads while two were writing"] += 1
        assert all([ended_well(writer) for writer in writers])
        assert loaded(tmp_path) in outputs(*models)

    def test_of_two_kinds_leave_a_winner_or_an_error_that_says_so(self, tmp_path):
        models = [adapted(seed=3), adapted(seed=4, r=5, projection_prng_key=1)]
        for _ in range(20 if SLOW else 3):
            writers = [start(lambda model=model: model.save_pretrained(tmp_path)) for model in models]
            assert all([ended_well(writer) for writer in writers])
            try:
                found = loaded(tmp_path)
            except RandLoraError:
                counted["mixtures of two adapters refused"] += 1
            else:
                assert found in outputs(*models)
