"""The share of an update that a method can express: the two steps of its search against updates that are known."""

import pytest
import torch
from torch import nn

from benchmarks import reach
from randlora import RandLoraConfig, get_peft_model


@pytest.fixture(params=[(12, 20), (20, 12)], ids=["tall", "wide"])
def layer(request):
    torch.manual_seed(0)
    config = RandLoraConfig(r=4, target_modules=["0"], init_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(*request.param)), config).base_model.model[0]


@pytest.fixture
def factors(layer):
    A, B = layer.basis("default").tensors(torch.device("cpu"), torch.float64, layer.sizes("default"))
    generator = torch.Generator().manual_seed(1)
    lam, gamma = (torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in layer._scalings("default"))
    return A, B, lam, gamma


def test_the_product_is_the_layers_update(layer):
    A, B = layer.basis("default").tensors(torch.device("cpu"), torch.float64, layer.sizes("default"))
    lam, gamma = (parameter.detach().double() for parameter in layer._scalings("default"))
    update = reach.tall(layer.get_delta_weight("default").detach().double())
    torch.testing.assert_close(layer.scaling["default"] * reach.product(A, B, lam, gamma), update, rtol=1e-5, atol=1e-5)


def test_each_step_finds_what_made_the_update(factors):
    A, B, lam, gamma = factors
    update = reach.product(A, B, lam, gamma)
    torch.testing.assert_close(reach.nearest_gamma(A, B, lam, update), gamma)
    torch.testing.assert_close(reach.nearest_lambda(A, B, gamma, update), lam)


def test_no_neighbour_is_nearer(factors):
    A, B, lam, gamma = factors
    update = torch.randn(len(B), A.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def distance(lam, gamma):
        return float((update - reach.product(A, B, lam, gamma)).square().sum())

    gamma = reach.nearest_gamma(A, B, lam, update)
    lam = reach.nearest_lambda(A, B, gamma, update)
    best = distance(lam, gamma)
    for _ in range(20):
        assert distance(lam + 1e-3 * torch.randn_like(lam), gamma) > best


def test_a_layer_reaches_a_part_of_any_update_and_its_share_is_that_of_the_distance(layer):
    update = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    reached = reach.randlora_reach(layer, update)
    count = sum(p.numel() for p in layer._scalings("default"))
    assert 0 < reached / float(update.square().sum()) < 3 * count / update.numel()  # noise has no cheap directions


def test_lora_reaches_the_largest_singular_values():
    update = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert reach.lora_reach(update, 2) == pytest.approx(13)
