import pytest
import torch
from benchmarks.methods import DENSE, FROZEN, FULL, LORA, METHODS, PEFT_DENSE, fill_scalings
from benchmarks.models import GPT2, Llama, linear_shapes, matched_lora_rank, twin
from torch import nn

LLAMA = Llama(hidden=32, intermediate=48, layers=2, heads=2, vocab=64, rank=8)
CONV = GPT2(hidden=32, layers=1, heads=2, vocab=64, rank=8)


@pytest.fixture(params=[LLAMA, CONV], ids=["Llama", "GPT-2"])
def architecture(request):
    return request.param


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_twin_has_modules_of_its_own_on_the_same_weights(architecture):
    base = architecture.build()
    other = twin(base)
    assert all(a is b for a, b in zip(base.parameters(), other.parameters(), strict=True))
    assert not {id(module) for module in base.modules()} & {id(module) for module in other.modules()}


def test_what_each_method_trains(architecture):
    base = architecture.build().requires_grad_(False)
    counts = {name: trainable(method(twin(base), architecture)) for name, method in METHODS.items()}
    shapes = linear_shapes(base, architecture.targets)
    randlora = sum(-(-min(shape) // 8) * (8 + min(shape)) for shape in shapes)
    assert counts[FROZEN] == 0
    assert counts[FULL] == sum(p.numel() for p in base.parameters())
    assert counts[DENSE] == counts[PEFT_DENSE] == randlora
    assert counts[LORA] == matched_lora_rank(base, architecture.targets, 8) * sum(sum(shape) for shape in shapes)
    assert not any(p.requires_grad for p in base.parameters())


def test_ours_and_the_peers_compute_the_same_with_filled_scalings(architecture):
    base = architecture.build().requires_grad_(False)
    models = [METHODS[name](twin(base), architecture) for name in (FROZEN, PEFT_DENSE, DENSE)]
    for model in models:
        fill_scalings(model)
    batch = architecture.batch(16)
    plain, peer, ours = (model(**batch).logits for model in models)
    torch.testing.assert_close(ours, peer, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, peer, rtol=1e-3, atol=1e-3)


def test_shapes_are_out_and_in_for_both_layouts():
    assert linear_shapes(LLAMA.build(), LLAMA.targets)[:5] == [(32, 32)] * 4 + [(48, 32)]
    assert linear_shapes(CONV.build(), CONV.targets) == [(96, 32), (32, 32), (128, 32), (32, 128)]
