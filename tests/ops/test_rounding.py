"""Stochastic rounding: a neighbour each time, right on average; and training with it beside the separate products."""

import pytest
import torch
from torch import nn

from randlora import RandLoraConfig, get_peft_model, set_stochastic_rounding
from randlora.ops import rounding


@pytest.fixture
def _enabled():
    set_stochastic_rounding(True)
    yield
    set_stochastic_rounding(False)


def draws(total, count):
    return torch.stack([rounding.stochastic(total, torch.tensor([seed])).double() for seed in range(count)])


def test_each_value_is_a_neighbour_and_bfloat16_numbers_stay():
    total = torch.randn(50, 40)
    found = rounding.stochastic(total, torch.tensor([3]))
    assert found.dtype == torch.bfloat16
    below = (total.view(torch.int32) & -65536).view(torch.float32)
    above = ((total.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((found.float() == below) | (found.float() == above)).all()
    exact = total.bfloat16().float()
    assert torch.equal(rounding.stochastic(exact, torch.tensor([3])).float(), exact)
    special = torch.tensor([[torch.inf, -torch.inf, 0.0, torch.nan]])
    kept = rounding.stochastic(special, torch.tensor([3]))
    assert torch.equal(kept[:, :3], special[:, :3].bfloat16())
    assert kept[0, 3].isnan()


@pytest.mark.parametrize("update", [1e-5, 1e-3])
def test_the_mean_error_is_within_its_standard_error(update):
    torch.manual_seed(1)
    weight = (torch.randn(64, 64) * 0.02).bfloat16().float()
    total = weight + update * torch.randn(64, 64)
    errors = draws(total, 200) - total.double()
    for mean, scale in (
        (errors.mean(), errors.std() / errors.numel() ** 0.5),
        ((errors * (total - weight).sign()).mean(), errors.std() / errors.numel() ** 0.5),
    ):
        assert mean.abs() < 3 * scale
    nearest = total.bfloat16().double() - total.double()
    lost = -(nearest * (total - weight).sign()).mean() / update
    kept = 1 + (errors * (total - weight).sign()).mean() / (total - weight).abs().mean()
    assert abs(kept - 1) < 0.05
    assert lost > 0.3 or update > 1e-4  # what rounding to nearest loses


def test_bits_are_even_and_independent_of_place_and_seed():
    half = torch.full((128, 128), 1.0 + 2**-9 + 2**-9)  # halfway between 1 and its neighbour 1 + 2**-7
    ups = (draws(half, 64) > 1).double()
    assert abs(ups.mean() - 0.5) < 4 * 0.5 / ups.numel() ** 0.5
    for first, second in ((ups[:, :, 1:], ups[:, :, :-1]), (ups[:, 1:], ups[:, :-1]), (ups[1:], ups[:-1])):
        agreement = ((first - 0.5) * (second - 0.5)).mean() * 4
        assert abs(agreement) < 4 / first.numel() ** 0.5


def test_a_seed_comes_from_torchs_generator():
    torch.manual_seed(5)
    first = rounding.new_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, rounding.new_seed(torch.device("cpu")))
    assert not torch.equal(first, rounding.new_seed(torch.device("cpu")))


def train():
    """A layer on a bf16 base, the weight that it is to learn, and the losses on the way."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48, bias=False)).bfloat16()
    model = get_peft_model(base, RandLoraConfig(r=8, target_modules=["0"]))
    layer = model.base_model.model[0]
    lam = layer.randlora_lambda["default"]
    with torch.no_grad():
        lam.normal_(std=0.05)
        goal = layer.weight.float() + layer.get_delta_weight("default")
        lam.zero_()
    optimizer, losses = torch.optim.Adam([lam, layer.randlora_gamma["default"]], lr=1e-3), []
    generator = torch.Generator().manual_seed(1)  # rounding draws from the global one
    for _ in range(120):
        x = torch.randn(256, 32, generator=generator).bfloat16()
        loss = (model(x).float() - x.float() @ goal.T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return layer, goal, losses


@pytest.mark.usefixtures("_enabled")
def test_training_follows_the_separate_products():
    layer, goal, stochastic = train()
    assert layer.plan(tokens=256).output == "fused"
    set_stochastic_rounding(False)
    layer, _, separate = train()
    assert layer.plan(tokens=256).output == "weight"
    assert separate[-1] < 0.02 * separate[0]
    # the noise of a weight: an ulp is at most 2**-7 of it, and rounding up or down has a variance of at most ulp² / 4
    noise = 32 * goal.square().mean().item() * 2.0**-16
    for mine, theirs in zip(stochastic, separate, strict=True):
        assert abs(mine - theirs) < 0.05 * theirs + noise


@pytest.mark.usefixtures("_enabled")
def test_it_is_for_bfloat16_only():
    assert rounding.is_stochastic(torch.bfloat16, torch.bfloat16)
    assert not rounding.is_stochastic(torch.bfloat16, torch.float32)
    assert not rounding.is_stochastic(torch.float16, torch.float16)
