"""Adapter folders with something wrong in them, drawn by Hypothesis."""

import io
import json
import os
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

from randlora import RandLoraConfig

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FIELDS = [field.name for field in fields(RandLoraConfig) if field.name != "peft_type"] + ["runtime_config", "unknown"]
NAMES = [
    "../../../etc/passwd",
    "/etc/passwd",
    "base_model.model.head.weight",  # of the base model
    "base_model.model.tall.base_layer.weight",
    "base_model.model.tall.bias",
    "base_model.model.nowhere.randlora_lambda",
    "base_model.model.tall.randlora_lambda.default",
    "base_model.nowhere.randlora_A",
    "randlora_A",
    "\x1b[2J\x1b]0;title\x07",
    "",
    "__class__",
    "a" * 5000,
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2, 3, 10**9, 2**63, 10**400, 1e308, 1e-308, float("nan"), float("inf")])
    | st.sampled_from(["", "(", "*", "tall", ".*", "all-linear", "none", "all", "peft", "../..", "CAUSAL_LM", "\x00"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
Change = Callable[[Path], None]


@st.composite
def changed_bytes(draw: st.DrawFn, name: str) -> Change:
    """One of the files cut, flipped, blown up or replaced."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "empty", "garbage", "pickle", "header"]))
    position, amount = draw(st.floats(0, 1)), draw(st.integers(1, 5))
    garbage = draw(st.binary(min_size=1, max_size=64))

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        at = int(position * (len(content) - 1))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip":
            for step in range(amount):
                content[(at + 7 * step) % len(content)] ^= 1 << (step + len(garbage)) % 8
        elif kind == "insert":
            content[at:at] = garbage
        elif kind == "header":  # a length that is none
            content[:8] = struct.pack("<Q", [2**63, 2**32, len(content), 0, int(position * 2**40)][amount - 1])
        else:
            content = {"empty": b"", "garbage": garbage, "pickle": pickled()}[kind]
        (folder / name).write_bytes(content)

    return change


@st.composite
def changed_header(draw: st.DrawFn) -> Change:
    """A safetensors header that is JSON and says something else."""
    which, value = draw(st.integers(0, 100)), draw(VALUES)
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    likely = {
        "dtype": st.sampled_from(["F64", "I8", "BOOL", "F8_E4M3", "X"]),
        "shape": st.lists(st.sampled_from([0, 1, 4, 17, 2**31, 2**63]), max_size=4),
        "data_offsets": st.lists(st.sampled_from([0, 8, 100, 2**40]), min_size=2, max_size=2),
    }
    value = draw(st.just(value) | likely[field])

    def change(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        name = sorted(header)[which % len(header)]
        header[name] = {**header[name], field: value}
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return change


@st.composite
def changed_tensors(draw: st.DrawFn) -> Change:
    """A whole safetensors file with other tensors."""
    which, name = draw(st.integers(0, 100)), draw(st.sampled_from(NAMES) | st.text(max_size=8))
    kind = draw(st.sampled_from(["drop", "rename", "add", "shape", "dtype", "value", "exchange", "base"]))
    dtype = draw(st.sampled_from([torch.int64, torch.bool, torch.float64, torch.float16, torch.complex64]))
    value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38]))

    def change(folder: Path) -> None:
        content = load((folder / WEIGHTS).read_bytes())
        names = sorted(content)
        chosen, other = names[which % len(names)], names[(which + 1) % len(names)]
        tensor = content[chosen]
        if kind in ("drop", "rename"):
            del content[chosen]
        if kind in ("rename", "add"):
            content[name] = tensor.clone()
        if kind == "shape":
            content[chosen] = [tensor[:-1], tensor.flatten(), tensor[None], tensor[..., :0]][which % 4].clone()
        if kind == "dtype":
            content[chosen] = tensor.nan_to_num().to(dtype)
        if kind == "value":
            content[chosen] = tensor.float().index_fill(-1, torch.tensor([0]), value)
        if kind == "exchange":
            content[chosen], content[other] = content[other], content[chosen]
        (folder / WEIGHTS).write_bytes(save(content))

    return change


@st.composite
def changed_config(draw: st.DrawFn) -> Change:
    """A config of JSON with other values."""
    changes = draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
    whole = draw(st.none() | VALUES | st.just({"peft_type": "NONE_SUCH"}))
    gone = draw(st.sampled_from([None, "r", "peft_type", "target_modules", "basis_fingerprint", "save_projection"]))

    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text()) | changes
        content.pop(gone, None)
        (folder / CONFIG).write_text(json.dumps(content if whole is None else whole))

    return change


@st.composite
def changed_files(draw: st.DrawFn) -> Change:
    """Something else where a file should be."""
    name = draw(st.sampled_from([CONFIG, WEIGHTS]))
    kind = draw(st.sampled_from(["gone", "folder", "pipe", "endless", "loop", "elsewhere", "pickle", "deep", "huge"]))

    def change(folder: Path) -> None:
        path = folder / name
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind in ("endless", "loop", "elsewhere"):
            path.symlink_to({"endless": "/dev/zero", "loop": name, "elsewhere": "/etc/passwd"}[kind])
        elif kind == "pickle":
            (folder / PICKLE).write_bytes(pickled())
        elif kind == "deep":
            path.write_text("[" * 100_000)
        elif kind == "huge":  # and sparse on the disk
            with path.open("wb") as file:
                file.truncate(2**28)

    return change


def pickled() -> bytes:
    """A pickle of tensors that would leave a trace if its code were run."""
    buffer = io.BytesIO()
    torch.save({"base_model.model.tall.randlora_lambda": torch.ones(4, 3), "code": Trace()}, buffer)
    return buffer.getvalue()


class Trace:
    """Unpickling it sets an environment variable."""

    def __reduce__(self):
        return exec, ("import os; os.environ['RANDLORA_UNPICKLED'] = 'yes'",)


def changes() -> st.SearchStrategy[Change]:
    kinds = [changed_bytes(WEIGHTS), changed_bytes(CONFIG), changed_header(), changed_tensors(), changed_config()]
    return st.one_of(*kinds, changed_files())
