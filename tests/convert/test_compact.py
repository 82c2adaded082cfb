"""Old files of PEFT's made small, and when they are not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from randlora import BasisMismatchError, CheckpointError, ConfigError
from randlora.convert import compact, compact_adapter
from randlora.tuner.files.adapter_folder import label_names
from tuner.files.test_checkpoint import load, saved, saved_by_peft
from tuner.helpers import STACK_TARGETS, output

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}], ids=["dense", "sparse", "very sparse"])
@pytest.mark.parametrize("targets", [STACK_TARGETS, ["tall"], ["tall", "square"]], ids=len)
def test_files_of_peft_lose_their_bases_and_compute_the_same(tmp_path, kind, targets):
    expected = saved_by_peft(tmp_path / "old", target_modules=targets, **kind)
    before = output(load(tmp_path / "old"))
    done = compact_adapter(tmp_path / "old", tmp_path / "new")
    assert not done.bases_kept
    assert not [name for name in load_file(tmp_path / "new" / WEIGHTS) if name.endswith(("randlora_A", "randlora_B"))]
    after = output(load(tmp_path / "new"))
    assert torch.equal(after, before)
    assert torch.allclose(after, expected, atol=1e-4)
    assert done.bytes_after < done.bytes_before


def test_the_names_of_labels_go_along(tmp_path):
    saved_by_peft(tmp_path / "run/adapter", target_modules=["tall"])
    (tmp_path / "run/base_model").mkdir()
    (tmp_path / "run/base_model/config.json").write_text('{"id2label": {"0": "bad", "1": "good"}}')
    compact_adapter(tmp_path / "run/adapter", tmp_path / "new")
    assert label_names(tmp_path / "new") == ("bad", "good")


def test_in_place_and_again(tmp_path):
    saved_by_peft(tmp_path, target_modules=STACK_TARGETS)
    before = output(load(tmp_path))
    compact_adapter(tmp_path)
    assert torch.equal(output(load(tmp_path)), before)
    with pytest.raises(ConfigError, match="as compact as it gets"):
        compact_adapter(tmp_path)


def test_bases_that_the_key_does_not_define_stay_once(tmp_path):
    saved_by_peft(tmp_path / "old", target_modules=STACK_TARGETS)
    content = load_file(tmp_path / "old" / WEIGHTS)
    for name, value in content.items():
        if name.endswith("randlora_B"):
            value.mul_(0.5)
    save_file(content, tmp_path / "old" / WEIGHTS, metadata={"format": "pt"})
    before = output(load(tmp_path / "old"))
    done = compact_adapter(tmp_path / "old", tmp_path / "new")
    assert done.bases_kept
    assert torch.equal(output(load(tmp_path / "new")), before)
    assert json.loads((tmp_path / "new/adapter_config.json").read_text())["save_projection"]


def test_copies_that_differ_are_refused(tmp_path):
    saved_by_peft(tmp_path / "old", target_modules=STACK_TARGETS)
    content = load_file(tmp_path / "old" / WEIGHTS)
    last = [name for name in sorted(content) if name.endswith("randlora_B")][-1]
    content[last] = content[last].clone().mul_(2)
    save_file(content, tmp_path / "old" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises((CheckpointError, BasisMismatchError)):
        compact_adapter(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_bases_of_another_fingerprint_are_refused(tmp_path):
    saved(tmp_path, target_modules=["square"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "basis_fingerprint": "0" * 64}))
    with pytest.raises(BasisMismatchError, match="0000"):
        compact_adapter(tmp_path)


def test_a_new_file_that_reads_back_wrong_leaves_the_old_one(tmp_path, monkeypatch):
    saved_by_peft(tmp_path, target_modules=STACK_TARGETS)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    true_save = compact.save_file

    def bad_disk(tensors, path, **options):
        true_save({name: value + 1 for name, value in tensors.items()}, path, **options)

    monkeypatch.setattr(compact, "save_file", bad_disk)
    with pytest.raises(CheckpointError, match="does not read back"):
        compact_adapter(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_new_config_beside_old_weights_loads(tmp_path, monkeypatch):
    """The one state in between."""
    saved_by_peft(tmp_path, target_modules=STACK_TARGETS)
    before = output(load(tmp_path))

    def crash(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compact, "write_atomically", crash)
    with pytest.raises(KeyboardInterrupt):
        compact_adapter(tmp_path)
    assert "randlora_A" in " ".join(load_file(tmp_path / WEIGHTS))
    assert torch.equal(output(load(tmp_path)), before)
