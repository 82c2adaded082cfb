"""Files appear whole or not at all."""

import errno
import json
import os
import stat
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from safetensors import SafetensorError

from randlora import PeftModel, RandLoraConfig, get_peft_model
from randlora.errors import ConfigError
from randlora.tuner.files.atomic import disk_errors, write_atomically, write_json

from ..helpers import STACK_TARGETS, output, randomise, stack


def write(text):
    def writer(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    return writer


class Broken(Exception):
    pass


def breaks(path):
    write("half of it")(path)
    raise Broken


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


class TestWriteAtomically:
    def test_writes_and_replaces(self, tmp_path):
        target = tmp_path / "file"
        for text in ("first", "second"):
            write_atomically(target, write(text))
            assert target.read_text() == text
        assert list(tmp_path.iterdir()) == [target]

    def test_a_writer_that_raises_leaves_the_old_file_and_nothing_else(self, tmp_path):
        target = tmp_path / "file"
        target.write_text("old")
        with pytest.raises(Broken):
            write_atomically(target, breaks)
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]

    def test_a_writer_that_raises_leaves_no_new_file(self, tmp_path):
        with pytest.raises(Broken):
            write_atomically(tmp_path / "file", breaks)
        assert list(tmp_path.iterdir()) == []

    def test_interruption_leaves_no_temporary(self, tmp_path):
        def interrupted(path):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "file", interrupted)
        assert list(tmp_path.iterdir()) == []

    def test_a_failing_rename_leaves_the_old_file(self, tmp_path, monkeypatch):
        target = tmp_path / "file"
        target.write_text("old")

        def refuse(*args):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(target, write("new"))
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]

    def test_the_old_file_is_readable_until_the_new_one_is_whole(self, tmp_path):
        target = tmp_path / "file"
        target.write_text("old")
        seen = []

        def look(path):
            write("new")(path)
            seen.append(target.read_text())

        write_atomically(target, look)
        assert seen == ["old"]

    def test_content_reaches_the_disk_before_the_name_does(self, tmp_path, monkeypatch):
        events = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("fsync") or fsync(descriptor))
        monkeypatch.setattr(os, "replace", lambda *names: events.append("replace") or replace(*names))
        write_atomically(tmp_path / "file", write("text"))
        assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder

    def test_mode_follows_the_umask(self, tmp_path, umask):
        write_atomically(tmp_path / "file", write("text"))
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
        assert os.umask(umask) == umask  # left as it was

    def test_mode_of_an_existing_file_stays(self, tmp_path):
        target = tmp_path / "file"
        target.write_text("old")
        target.chmod(0o640)
        write_atomically(target, write("new"))
        assert stat.S_IMODE(target.stat().st_mode) == 0o640

    def test_in_the_working_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_atomically("file", write("text"))
        assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("reason", ["I/O error: No space left on device (os error 28)", "header too large"])
def test_a_full_disk_is_an_oserror_whatever_writes(tmp_path, reason):
    def full(path):
        raise SafetensorError(f"Error while serializing: {reason}")

    with pytest.raises(OSError if "os error" in reason else SafetensorError, match=r"No space|header") as raised:
        write_atomically(tmp_path / "file", full)
    if "os error" in reason:
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_json_is_sorted_and_readable(tmp_path):
    write_json({"b": 1, "a": [2]}, tmp_path / "new", "x.json")
    text = (tmp_path / "new" / "x.json").read_text()
    assert text == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'


def test_what_is_no_json_leaves_the_old_file(tmp_path):
    write_json({"a": 1}, tmp_path, "x.json")
    with pytest.raises(TypeError):
        write_json({"a": object()}, tmp_path, "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


class TestAdapters:
    def adapter(self, seed=3):
        return randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS)), seed=seed)

    def test_a_save_that_fails_leaves_the_old_adapter(self, tmp_path, monkeypatch):
        old = self.adapter()
        old.save_pretrained(tmp_path)
        names = sorted(path.name for path in tmp_path.iterdir())
        serialize = safetensors.torch.serialize_file if hasattr(safetensors.torch, "serialize_file") else None
        assert serialize is not None

        def half(tensors, filename, *args, **kwargs):
            with open(filename, "wb") as file:
                file.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(safetensors.torch, "serialize_file", half)
        with pytest.raises(OSError, match="disk full"):
            self.adapter(seed=4).save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert torch.equal(output(PeftModel.from_pretrained(stack(), tmp_path)), output(old))

    def test_mode_of_the_files(self, tmp_path, umask):
        self.adapter().save_pretrained(tmp_path / "adapter")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert stat.S_IMODE((tmp_path / "adapter" / name).stat().st_mode) == 0o666 & ~umask

    def test_other_methods_write_as_before(self, tmp_path):
        model = get_peft_model(stack(), LoraConfig(r=2, target_modules=STACK_TARGETS))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(stack(), tmp_path)
        assert torch.equal(output(loaded), output(model))


class TestDiskErrors:
    @pytest.mark.parametrize(
        "error",
        [
            Exception("No space left on device (os error 28)"),  # tokenizers
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            OSError(28, "No space left on device"),  # of a file that is open
        ],
    )
    def test_a_full_disk_is_one_error_that_names_the_place(self, tmp_path, error):
        with pytest.raises(OSError, match="No space left") as found, disk_errors(tmp_path):
            raise error
        assert (found.value.errno, found.value.filename) == (28, str(tmp_path))

    def test_what_torch_says_counts_where_no_space_is_left(self, tmp_path, monkeypatch):
        error = RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file")
        with pytest.raises(RuntimeError), disk_errors(tmp_path):
            raise error
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(OSError, match="No space left"), disk_errors(tmp_path):
            raise error

    @pytest.mark.parametrize(
        "error", [ValueError("x"), ConfigError("(os error 2)"), OSError(111, "Connection refused")]
    )
    def test_others_stay_as_they_are(self, tmp_path, error):
        with pytest.raises(type(error)) as found, disk_errors(tmp_path):
            raise error
        assert found.value is error
