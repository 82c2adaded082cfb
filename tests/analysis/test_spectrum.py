import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora.analysis import spectrum as module
from randlora.analysis.spectrum import spectrum, spectrum_of_product
from randlora.errors import ConfigError

sizes = st.integers(1, 40)


def entropy_rank(values: torch.Tensor) -> float:
    shares = values / values.sum()
    return math.exp(-sum(p * math.log(p) for p in shares.tolist() if p > 0))


@given(rows=sizes, columns=sizes, seed=st.integers(0, 99))
def test_all_values_are_those_of_the_decomposition(rows, columns, seed):
    update = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    expected = torch.linalg.svdvals(update.double())
    found = spectrum([update])
    assert found.exact
    assert found.size == len(expected) == found.index[-1]
    assert found.norm == pytest.approx(expected.norm().item())
    assert found.effective_rank == pytest.approx(entropy_rank(expected), rel=1e-6)
    assert found.values == pytest.approx([expected[i - 1].item() for i in found.index], abs=1e-7 * expected[0].item())


@given(rows=sizes, columns=sizes, rank=st.integers(1, 12))
def test_a_product_has_the_values_of_its_matrix(rows, columns, rank):
    draw = torch.Generator().manual_seed(rows * columns)
    left, right = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
    whole, factored = spectrum([left.double() @ right.double()]), spectrum_of_product(left, right)
    assert factored.size == whole.size
    assert factored.norm == pytest.approx(whole.norm)
    assert factored.values == pytest.approx(whole.values, abs=1e-6 * whole.norm)
    assert factored.effective_rank <= rank + 1e-6


def test_a_stack_is_block_diagonal():
    draw = torch.Generator().manual_seed(0)
    blocks = [torch.randn(6, 9, generator=draw), torch.randn(6, 9, generator=draw)]
    both, whole = spectrum(blocks), spectrum([torch.block_diag(*blocks)])
    assert both.values == pytest.approx(whole.values, rel=1e-5)
    assert both.effective_rank == pytest.approx(whole.effective_rank)


def test_no_update_has_rank_zero():
    found = spectrum([torch.zeros(5, 7)])
    assert (found.norm, found.effective_rank, found.values) == (0.0, 0.0, (0.0,) * 5)


@pytest.mark.parametrize("decay", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("shape", [(700, 500), (500, 700)])
def test_the_estimate_is_near_the_truth(monkeypatch, decay, shape):
    update = torch.randn(shape) * torch.exp(-torch.linspace(0, decay, shape[1]))
    truth = spectrum([update])
    monkeypatch.setattr(module, "LARGEST_EXACT", 10)
    found = spectrum([update])
    assert not found.exact
    assert found.size == truth.size
    assert found.norm == pytest.approx(truth.norm, rel=1e-6)
    assert found.effective_rank == pytest.approx(truth.effective_rank, rel=0.05)
    assert found.values[0] == pytest.approx(truth.values[0], rel=0.02)
    middle = [n for n, index in enumerate(truth.index) if 50 < index < 250]
    for n in middle:
        assert found.values[n] == pytest.approx(truth.values[n], rel=0.3)


def test_the_estimate_survives_a_low_rank_and_zero(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_EXACT", 10)
    draw = torch.Generator().manual_seed(0)
    low = spectrum([torch.randn(300, 3, generator=draw) @ torch.randn(3, 200, generator=draw)])
    assert 1 <= low.effective_rank <= 6
    assert low.values[-1] <= 1e-3 * low.values[0]
    assert spectrum([torch.zeros(300, 200)]).effective_rank == 0


@pytest.mark.parametrize("limit", [10, 2048], ids=["estimated", "computed"])
def test_values_whose_squares_float32_does_not_hold(monkeypatch, limit):
    monkeypatch.setattr(module, "LARGEST_EXACT", limit)
    update = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    small, large = spectrum([update]), spectrum([update * 2.0**100])
    assert large.values == pytest.approx([value * 2.0**100 for value in small.values], rel=1e-3)
    assert large.effective_rank == pytest.approx(small.effective_rank, rel=1e-3)


def test_an_update_that_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match="not finite"):
        spectrum([torch.ones(3, 4), torch.full((3, 4), math.inf)])


def test_a_rank_between_the_places_that_are_shown_is_counted():
    found = spectrum_of_product(torch.randn(384, 32), torch.randn(32, 384))
    assert 32 not in found.index
    assert found.nonzero == 32
