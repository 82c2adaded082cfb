"""The judge itself: the formula, and PEFT's own update."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.randlora import RandLoraConfig as PeftConfig
from peft.tuners.randlora import RandLoraModel as PeftModel
from torch import nn

from randlora.ops import naive


@settings(deadline=None)
@given(
    out_features=st.integers(1, 24),
    in_features=st.integers(1, 24),
    rank=st.integers(1, 30),
    kind=st.sampled_from(["dense", "sparse", "very_sparse"]),
    larger=st.booleans(),
)
def test_same_update_as_peft(out_features, in_features, rank, kind, larger):
    layers = {"layer": nn.Linear(in_features, out_features)}
    if larger:  # then the layer cuts its bases out of larger ones
        layers["other"] = nn.Linear(in_features + 5, out_features + 3)
    flags = {} if kind == "dense" else {kind: True}
    config = PeftConfig(r=rank, target_modules=list(layers), **flags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the std of a single value
        model = PeftModel(nn.ModuleDict(layers), config, "default").double()
    theirs = model.model["layer"]
    A, B = model.randlora_A["default"].nan_to_num(1.0), model.randlora_B["default"].nan_to_num(1.0)
    model.randlora_A["default"], model.randlora_B["default"] = A, B
    lam, gamma = theirs.randlora_lambda["default"].data.normal_(), theirs.randlora_gamma["default"].data.normal_()

    n = lam.shape[1]  # PEFT cuts by base, hence the flattening of the cut
    update = naive.delta_weight(
        A.squeeze(1), B[:, :n].flatten(1), lam, gamma, config.randlora_alpha / rank, out_features, in_features
    )
    torch.testing.assert_close(update, theirs.get_delta_weight("default").detach(), rtol=1e-12, atol=1e-12)


def test_a_value_computed_by_hand():
    A = torch.tensor([[2.0, 3.0]])  # r = 1, m = 2
    B = torch.tensor([[1.0, 10.0], [0.0, 1.0], [4.0, 0.0]])  # M = 3, n = 2
    lam = torch.tensor([[5.0, 7.0]])
    gamma = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # row of base 0: 5·[2·1, 3·2] = [10, 30]; of base 1: 7·[2·3, 3·4] = [42, 84]
    expected = torch.tensor([[10.0 + 420, 30 + 840], [42, 84], [40, 120]]) * 0.5
    assert torch.equal(naive.delta_weight(A, B, lam, gamma, 0.5, 3, 2), expected)
    assert torch.equal(naive.delta_weight(A, B, lam, gamma, 0.5, 2, 3), expected.T)


def test_full_rank_where_n_times_r_reaches_the_smaller_dimension():
    torch.manual_seed(0)
    for rank in (1, 3, 5, 11):
        n = -(-11 // rank)
        A, B = torch.randn(rank, 11).double(), torch.randn(17, n * rank).double()
        lam, gamma = torch.randn(rank, n).double(), torch.randn(n, 11).double()
        update = naive.delta_weight(A, B, lam, gamma, 1.0, 17, 11)
        assert torch.linalg.matrix_rank(update) == 11


def test_the_smaller_bases_of_a_layer_are_cut_from_larger_ones():
    torch.manual_seed(0)
    A, B = torch.randn(2, 9), torch.randn(13, 5 * 2)
    lam, gamma = torch.randn(2, 3), torch.randn(3, 6)
    cut = naive.delta_weight(A[:, :6], B[:8, :6], lam, gamma, 2.0, 8, 6)
    assert torch.equal(naive.delta_weight(A, B, lam, gamma, 2.0, 8, 6), cut)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_sum_of_base_and_update(bias):
    torch.manual_seed(0)
    x, weight, update = torch.randn(4, 3).double(), torch.randn(5, 3).double(), torch.randn(5, 3).double()
    offset = torch.randn(5).double() if bias else None
    expected = nn.functional.linear(x, weight + update, offset)
    torch.testing.assert_close(naive.linear(x, weight, offset, update), expected, rtol=1e-12, atol=1e-12)
