"""Adapters that four versions of PEFT wrote compute here what they computed there."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from randlora import PeftModel
from randlora.convert import compact_adapter

from .corpus.make import CASES, Model, inputs

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "corpus").glob("*/adapter_config.json"))


def assert_same_output(folder: Path, expected: torch.Tensor) -> None:
    with torch.no_grad():
        found = PeftModel.from_pretrained(Model(), folder).eval()(inputs())
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
        assert (Model()(inputs()) - expected).abs().max() > 1e-2 * expected.abs().max()  # the adapter matters


def test_the_corpus_is_whole():
    versions = {path.name.partition("-")[0] for path in FOLDERS}
    assert versions == {"0.16.0", "0.17.1", "0.19.1", "0.21.2"}
    assert [path.name for path in FOLDERS] == sorted(f"{version}-{case}" for version in versions for case in CASES)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_same_outputs(folder, tmp_path):
    expected = load_file(folder / "output.safetensors")["output"]
    version, _, case = folder.name.partition("-")
    if case == "biases" and version < "0.21":
        with pytest.warns(UserWarning, match=r"PEFT wrote none before 0\.21"):
            PeftModel.from_pretrained(Model(), folder)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same_output(folder, expected)
    assert any("drawn from projection_prng_key" in str(w.message) for w in caught) == (case == "without_bases")
    if case != "without_bases":
        compact_adapter(folder, tmp_path / "compact")
        assert_same_output(tmp_path / "compact", expected)
