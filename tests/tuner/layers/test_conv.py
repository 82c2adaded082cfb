"""Convolutions: the contract, and every setting that a convolution has."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.tuner.layers.conv import Conv1d, Conv2d, Conv3d

from ..contract import Contract
from ..helpers import assert_close, ours, randomise


class ConvContract(Contract):
    """A subclass gives the convolution and the size of its input."""

    size: tuple[int, ...]
    settings: dict = {}  # noqa: RUF012

    def make_base(self):
        plain = {Conv1d: nn.Conv1d, Conv2d: nn.Conv2d, Conv3d: nn.Conv3d}[self.kind]
        return plain(*self.channels, **self.settings)

    def input(self, dtype=torch.float32):
        return torch.randn(*self.size, generator=torch.Generator().manual_seed(2)).to(dtype)

    def to_layout(self, update):
        return update.reshape(self.make_base().weight.shape)


class TestConv1d(ConvContract):
    kind, shape, channels, size = Conv1d, (7, 15), (5, 7), (2, 5, 11)
    settings = {"kernel_size": 3, "stride": 2, "padding": 1}  # noqa: RUF012


class TestConv2dTall(ConvContract):
    kind, shape, channels, size = Conv2d, (14, 9), (1, 14), (2, 1, 7, 6)
    settings = {"kernel_size": 3, "padding": "same", "padding_mode": "reflect", "bias": False}  # noqa: RUF012


class TestConv2dGroups(ConvContract):
    kind, shape, channels, size = Conv2d, (6, 12), (9, 6), (2, 9, 7, 6)
    settings = {"kernel_size": (2, 2), "groups": 3, "dilation": (2, 1)}  # noqa: RUF012


class TestConv2dDepthwise(ConvContract):
    kind, shape, channels, size = Conv2d, (8, 9), (8, 8), (2, 8, 5, 5)
    settings = {"kernel_size": 3, "groups": 8, "padding_mode": "circular", "padding": 1}  # noqa: RUF012


class TestConv3dWithoutBatch(ConvContract):
    kind, shape, channels, size = Conv3d, (5, 24), (3, 5), (3, 4, 4, 5)
    settings = {"kernel_size": 2}  # noqa: RUF012


@given(
    groups=st.integers(1, 3),
    inside=st.integers(1, 4),
    out=st.integers(1, 5),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    mode=st.sampled_from(["zeros", "replicate"]),
    rank=st.integers(1, 6),
)
def test_any_convolution(groups, inside, out, kernel, stride, padding, mode, rank):
    torch.manual_seed(0)
    base = nn.Conv2d(
        groups * inside, groups * out, kernel, stride=stride, padding=padding, groups=groups, padding_mode=mode
    )
    x = torch.randn(2, groups * inside, 7, 6)
    layer = randomise(ours(nn.Sequential(base), r=rank, target_modules=["0"])).model[0]
    weight = base.weight + layer.get_delta_weight("default").detach()
    torch.testing.assert_close(layer(x), base._conv_forward(x, weight, base.bias), rtol=1e-4, atol=1e-4)


def test_small_updates_of_half_precision_are_not_rounded_away():
    torch.manual_seed(0)
    base = nn.Conv2d(8, 8, 3).bfloat16()
    layer = randomise(ours(nn.Sequential(base), r=4, target_modules=["0"])).model[0]
    layer.scaling["default"] = 1e-6
    x = torch.randn(4, 8, 5, 5).bfloat16()
    update = layer.get_delta_weight("default").detach()
    assert (base.weight + update.bfloat16() == base.weight).float().mean() > 0.9
    # the output of the base layer rounds too: what is added to it is what counts
    base.weight.data.zero_()
    base.bias.data.zero_()
    assert_close(layer(x).detach(), base.double()._conv_forward(x.double(), update.double(), None), 2e-2)


@pytest.mark.parametrize("train", [True, False])
def test_dropout_drops_the_adapters_input_alone(train):
    torch.manual_seed(0)
    base = nn.Conv1d(6, 5, 3)
    layer = randomise(ours(nn.Sequential(base), r=4, target_modules=["0"], randlora_dropout=0.5)).model[0].train(train)
    x = torch.randn(2, 6, 9)
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5, train)
    update = nn.functional.conv1d(dropped, layer.get_delta_weight("default"))
    assert_close(found.detach(), (base(x) + update).detach(), 1e-5)


def test_hooks_of_the_base_layer_run():
    layer = TestConv1d().layer()
    x, called = TestConv1d().input(), []
    expected = layer(x)
    layer.base_layer.register_forward_hook(lambda *args: called.append(1))
    assert_close(layer(x).detach(), expected.detach(), 1e-5)
    assert called == [1]


def test_bases_are_sized_by_matrices_of_convolutions_and_linear_layers_together():
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Linear(20, 30))
    adapted = ours(model, r=4, target_modules=["0", "1"])
    assert adapted.randlora_A["default"].shape == (4, 1, 20)  # used of min(max out 30, max in 75)
    assert adapted.randlora_B["default"].shape[0] == 75
    assert adapted.model[0].bases["default"] is adapted.model[1].bases["default"]


def test_a_transposed_convolution_is_refused():
    with pytest.raises(randlora.UnsupportedLayerError, match="'0' is a ConvTranspose2d"):
        ours(nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), target_modules=["0"])
