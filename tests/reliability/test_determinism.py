"""The same numbers again: in other processes, whatever their defaults, and when the same training runs again."""

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ops.bases.test_bases import GOLDEN
from process_wide import default_dtype, generators
from randlora import PeftModel, RandLoraConfig, get_peft_model
from randlora.ops.bases import basis as bases
from randlora.ops.bases import dense, ternary
from tuner.helpers import LLAMA_TARGETS, llama, randomise, tokens

from .children import ended_well, start

VARIANTS = {
    "dense": {},
    "sparse": {"sparse": True},
    "very sparse": {"sparsity": 64.0},
    "bf16": {"dtype": torch.bfloat16},
    "dropout": {"randlora_dropout": 0.2},
    "two adapters": {"adapters": ("default", "other")},
    "checkpointing": {"checkpointing": True},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(variant: str) -> str:
    """Hash of a model's λ and γ and losses after five steps."""
    values = dict(VARIANTS[variant])
    dtype, names = values.pop("dtype", torch.float32), values.pop("adapters", ("default",))
    checkpointing = values.pop("checkpointing", False)
    torch.manual_seed(7)
    config = RandLoraConfig(r=4, randlora_alpha=8, target_modules=LLAMA_TARGETS, **values)
    model = get_peft_model(llama().to(dtype), config).train()
    for name in names[1:]:
        model.add_adapter(name, RandLoraConfig(r=3, projection_prng_key=9, target_modules=["q_proj", "down_proj"]))
    model.base_model.set_adapter(list(names))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, digest = torch.optim.AdamW(parameters, lr=1e-2), hashlib.sha256()
    for _ in range(5):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        digest.update(loss.detach().float().numpy().tobytes())
    for parameter in parameters:
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def outputs() -> str:
    """Hash of what adapted models compute."""
    digest = hashlib.sha256()
    for variant in ("dense", "sparse", "very sparse"):
        config = RandLoraConfig(r=4, target_modules=LLAMA_TARGETS, **VARIANTS[variant])
        model = randomise(get_peft_model(llama(), config)).eval()
        with torch.no_grad():
            digest.update(model(input_ids=tokens()).logits.numpy().tobytes())
    return digest.hexdigest()


def fresh_process(expression: str) -> list[str]:
    """What a new interpreter prints of an expression of this module, evaluated with one thread."""
    code = f"import torch; torch.set_num_threads(1); from reliability.test_determinism import *; print({expression})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_training_again_in_another_process_gives_the_same_bits():
    here = [trained(variant) for variant in VARIANTS]
    assert here == [trained(variant) for variant in VARIANTS]
    assert len(set(here)) == len(here) - 1  # checkpointing changes no bit
    assert fresh_process("*(trained(variant) for variant in VARIANTS)") == here


def test_forked_and_spawned_processes_compute_the_same_bits():
    here = outputs()

    def in_fork():
        bases._live.clear()  # drawn again
        assert outputs() == here

    assert ended_well(start(in_fork))
    assert fresh_process("outputs()") == [here]


def test_thread_counts_and_seeds_change_outputs_by_no_more_than_rounding():
    config, found = RandLoraConfig(r=4, target_modules=LLAMA_TARGETS), []
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(count)
        found.append(randomise(get_peft_model(llama(), config)).eval()(input_ids=tokens()).logits)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("default", [lambda: default_dtype(torch.float64), lambda: torch.device("meta")])
@pytest.mark.parametrize("variant", ["dense", "sparse", "very sparse", "bf16"])
def test_defaults_of_dtype_and_device_change_no_step(variant, default):
    config = dict(VARIANTS[variant])
    dtype = config.pop("dtype", torch.float32)
    base, x = nn.Sequential(nn.Linear(30, 20)).to(dtype), torch.randn(6, 30).to(dtype)
    layer = randomise(get_peft_model(base, RandLoraConfig(r=4, target_modules=["0"], **config))).base_model.model[0]
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def step():
        bases._live.clear()
        layer.bind_basis("default", bases.get_basis(layer.basis("default").spec))  # drawn again
        y = layer(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), parameters)]

    expected = step()
    with default():
        found = step()
    for value, wanted in zip(found, expected, strict=True):
        assert (value.dtype, value.device) == (wanted.dtype, wanted.device)
        assert torch.equal(value, wanted)


def test_nobodys_generator_is_touched(tmp_path):
    model, again = llama(), llama()
    before = generators()
    model = get_peft_model(model, RandLoraConfig(r=4, target_modules=LLAMA_TARGETS))
    model.add_adapter("other", RandLoraConfig(r=3, sparse=True, target_modules=["q_proj"]))
    assert generators() == before
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "other", "again")
    model.merge_adapter()
    model.unmerge_adapter()
    PeftModel.from_pretrained(again, tmp_path)
    assert generators() == before


class TestByteOrder:
    def test_words_in_the_other_order_draw_the_same_numbers(self, monkeypatch):
        words = dense.words
        for kind in (dense, ternary):
            monkeypatch.setattr(kind, "words", lambda *args: (block.astype(">u4") for block in words(*args)))
        bases._live.clear()
        assert [bases.get_basis(spec).fingerprint for spec in GOLDEN] == [name for _, name in GOLDEN.values()]

    def test_numbers_in_the_other_order_have_the_same_fingerprint(self, monkeypatch):
        """As ``Tensor.numpy`` gives them where the machine is big-endian."""
        bases._live.clear()
        drawn = [bases.get_basis(spec) for spec in GOLDEN]
        numpy = torch.Tensor.numpy
        monkeypatch.setattr(torch.Tensor, "numpy", lambda self: swapped(numpy(self)))
        assert [basis.fingerprint for basis in drawn] == [name for _, name in GOLDEN.values()]

    def test_files_hold_little_endian_numbers(self, tmp_path):
        model = randomise(get_peft_model(llama(), RandLoraConfig(r=4, target_modules=["q_proj"])))
        model.save_pretrained(tmp_path)
        data = (tmp_path / "adapter_model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        stored, lam = json.loads(data[8 : 8 + length]), next(p for n, p in model.named_parameters() if "lambda" in n)
        first, end = next(value["data_offsets"] for name, value in stored.items() if "lambda" in name)
        expected = struct.pack(f"<{lam.numel()}f", *lam.flatten().tolist())
        assert data[8 + length + first : 8 + length + end] == expected


def swapped(array: np.ndarray) -> np.ndarray:
    """Equal numbers whose bytes stand the other way round."""
    return array.astype(array.dtype.newbyteorder("S"))
