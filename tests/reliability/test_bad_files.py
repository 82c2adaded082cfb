"""Bad adapters are refused with an error that says why, and leave the model as it was.

Hypothesis spoils good folders in the ways of ``spoil.py``. An adapter may still load: a flipped bit of λ without a
checksum is another λ. Then it must be an adapter, and nothing but an adapter.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from cli.conftest import save_adapter
from randlora import PeftModel, RandLoraConfig, RandLoraError, get_peft_model, hotswap_adapter
from randlora_cli import app
from tuner.helpers import STACK_TARGETS, output, randomise, snapshot, stack

from .limits import bounded
from .spoil import CONFIG, WEIGHTS, changes

KINDS = {
    "bases in the file": {},
    "no bases": {"save_projection": False},
    "no fingerprint": {"basis_fingerprint": None, "target_modules": ["tall"]},
    "other parts": {"bias": "all", "modules_to_save": ["head"], "sparse": True},
}
FUZZ = settings(suppress_health_check=list(HealthCheck))
counted: Counter[str] = Counter()


def made(folder: Path, **config) -> Path:
    values = {"r": 4, "randlora_alpha": 8, "target_modules": STACK_TARGETS, **config}
    randomise(get_peft_model(stack(), RandLoraConfig(**values))).save_pretrained(folder)
    if "basis_fingerprint" in config:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"basis_fingerprint": None}))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    return {kind: made(tmp_path_factory.mktemp("good"), **config) for kind, config in KINDS.items()}


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    yield
    print(f"\nspoilt adapters: {dict(counted)}")
    assert "RANDLORA_UNPICKLED" not in os.environ


@contextmanager
def spoilt(folder: Path, *changes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(folder, Path(place) / "adapter"))
        for change in changes:
            small = all((copy / name).is_file() and (copy / name).stat().st_size < 10**6 for name in (CONFIG, WEIGHTS))
            with suppress(Exception):  # what is spoilt already
                if small:
                    change(copy)
        yield copy


def state(model: nn.Module) -> dict[str, object]:
    """All that a failed load must leave alone."""
    tensors = {name: (value.dtype, value.numpy().tobytes()) for name, value in snapshot(model).items()}
    configs = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    return {
        "tensors": tensors,
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "modules": [(name, id(m), m.training) for name, m in model.named_modules()],
        "configs": configs,
        "active": getattr(model, "active_adapters", None),
        "output": output(model).detach().numpy().tobytes(),
    }


def base_weights(model: nn.Module) -> dict[str, bytes]:
    """Of the original modules, by their names there, without the biases, which an adapter may bring."""
    names = ("original_module.", "base_layer.", "base_model.model.")
    found = {}
    for name, value in model.state_dict().items():
        if "randlora_" in name or "modules_to_save" in name or name.endswith("bias"):
            continue
        plain = name
        for part in names:
            plain = plain.replace(part, "")
        found[plain] = value.numpy().tobytes()
    return found


def from_pretrained(folder: Path) -> tuple[nn.Module, object]:
    model = stack()
    return model, lambda: PeftModel.from_pretrained(model, folder)


def load_adapter(folder: Path) -> tuple[nn.Module, object]:
    model = randomise(get_peft_model(stack(), RandLoraConfig(r=3, target_modules=["tall", "square"])))
    return model, lambda: model.load_adapter(folder, "second")


def into_its_place(folder: Path) -> tuple[nn.Module, object]:
    model = randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS)))
    return model, lambda: model.load_adapter(folder, "default")


def hotswap(folder: Path) -> tuple[nn.Module, object]:
    model = randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS)))
    return model, lambda: hotswap_adapter(model, str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_the_good_ones_load(kind, good):
    for way in (from_pretrained, load_adapter):
        model, load = way(good[kind])
        result = load()
        assert base_weights(result if way is from_pretrained else model) == base_weights(stack())


@pytest.mark.parametrize("way", [from_pretrained, load_adapter, into_its_place, hotswap])
@FUZZ
@given(kind=st.sampled_from(sorted(KINDS)), first=changes(), second=st.none() | changes())
def test_a_bad_adapter_leaves_the_model_as_it_was(way, kind, first, second, good):
    with spoilt(good[kind], first, *([second] if second else [])) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, load = way(folder)
        before = state(model)
        try:
            with bounded():
                result = load()
        except RandLoraError:
            counted["refused"] += 1
            assert state(model) == before
        else:
            counted["loaded"] += 1
            loaded = result if isinstance(result, nn.Module) else model
            assert base_weights(loaded) == base_weights(stack())


TOOLS = [
    "inspect BAD",
    "inspect BAD --json",
    "diff GOOD BAD",
    "convert BAD OUT --to compact",
    "convert BAD OUT --to lora --rank 2",
    "convert BAD --to compact --in-place",
    "merge BAD OUT",
    "report BAD --output OUT",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_llama) -> Path:
    return save_adapter(tiny_llama, tmp_path_factory.mktemp("good"), target_modules=["q_proj", "k_proj"])


@pytest.mark.parametrize("command", TOOLS)
@FUZZ
@given(change=changes())
def test_the_tools_refuse_a_bad_adapter_in_one_line(command, change, adapter):
    with spoilt(adapter, change) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()}
        out = folder.parent / "out"
        places = {"BAD": folder, "GOOD": adapter, "OUT": out}
        arguments = [str(places.get(word, word)) for word in command.split()]
        with bounded():
            result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, arguments)
        counted["tools " + ("did their work" if result.exit_code == 0 else "refused")] += 1
        assert result.exit_code in (0, 1, 2), result.exception
        assert result.exit_code == 0 or isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output
        assert "\x1b" not in result.output
        if result.exit_code == 2:
            assert not out.exists()
            assert {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()} == before
