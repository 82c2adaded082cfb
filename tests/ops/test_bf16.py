"""Products with bfloat16 factors keep float32's precision, whichever way this machine computes them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from process_wide import default_dtype
from randlora.ops import bf16
from randlora.ops.bf16 import split_mm, sum_of_products

here = pytest.mark.skipif(not bf16.available, reason="needs a CPU with AMX, as its twin test on any machine does not")
sizes = st.integers(1, 40)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def views(matrix):
    """The same numbers in the memory layouts that slices and transposes have."""
    i, k = matrix.shape
    wider = torch.full((i + 3, k + 5), float("nan"), dtype=matrix.dtype)
    wider[:i, :k] = matrix
    strided = torch.full((i, 2 * k), float("nan"), dtype=matrix.dtype)
    strided[:, ::2] = matrix
    return matrix.contiguous(), matrix.T.contiguous().T, wider[:i, :k], wider.T.contiguous().T[:i, :k], strided[:, ::2]


def gemm_into(out, a, b, adds):
    """What the matrix units do."""
    out.copy_(a.float() @ b.float() + (out if adds else 0))


@pytest.fixture(params=["this machine", "units", "torch's own", "float32"])
def anywhere(request, monkeypatch):
    """On this machine and on others."""
    if request.param == "this machine":
        return
    monkeypatch.setattr(bf16, "available", request.param == "units")
    monkeypatch.setattr(bf16, "_slow", dict.fromkeys(bf16._slow, request.param == "float32"))
    if request.param == "units":
        monkeypatch.setattr(bf16, "_gemm_into", gemm_into)


class TestSplit:
    @here
    @settings(deadline=None)
    @given(i=sizes, k=sizes, j=sizes, seed=st.integers(0, 99), left=st.booleans(), based=st.booleans())
    def test_is_as_precise_as_float32(self, i, k, j, seed, left, based):
        a, b = draw(i, k, seed=seed).float(), draw(k, j, seed=seed + 1).float()
        a, b = (a, b.bfloat16()) if left else (a.bfloat16(), b)
        base = draw(i, j, seed=seed + 2).float() if based else None
        exact = a.double() @ b.double() + (0 if base is None else base.double())
        terms = a.double().abs() @ b.double().abs() + (0 if base is None else base.double().abs())
        found = split_mm(a, b, base)
        assert found.dtype == torch.float32
        assert ((found.double() - exact).abs() <= 8 * torch.finfo(torch.float32).eps * terms).all()

    @here
    def test_reads_any_layout(self):
        a, b = draw(7, 9).float(), draw(9, 5, seed=1).bfloat16()
        expected = split_mm(a, b)
        for first, second in itertools.product(views(a), views(b)):
            torch.testing.assert_close(split_mm(first, second), expected)
        for first, second in itertools.product(views(b.T), views(a.T)):
            torch.testing.assert_close(split_mm(first, second), expected.T)

    @here
    def test_long_sides_are_split_in_blocks(self):
        a, b = draw(2500, 6).float(), draw(6, 4, seed=1).bfloat16()
        torch.testing.assert_close(split_mm(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
        found, expected = split_mm(a.bfloat16().T, a), a.bfloat16().double().T @ a.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)

    @here
    def test_leaves_its_inputs_alone(self):
        a, b, base = draw(3, 4).float(), draw(4, 5, seed=1).bfloat16(), draw(3, 5, seed=2).float()
        kept = [t.clone() for t in (a, b, base)]
        split_mm(a, b, base)
        assert all(torch.equal(t, copy) for t, copy in zip((a, b, base), kept, strict=True))

    @here
    @pytest.mark.parametrize(("i", "k", "j"), [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
    def test_of_nothing(self, i, k, j):
        found = split_mm(torch.ones(i, k), torch.ones(k, j).bfloat16())
        assert torch.equal(found, torch.zeros(i, j))
        assert torch.equal(split_mm(torch.ones(i, k), torch.ones(k, j).bfloat16(), torch.ones(i, j)), torch.ones(i, j))


class TestSumOfProducts:
    @pytest.mark.usefixtures("anywhere")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("addend", [True, False])
    @pytest.mark.parametrize("pairs", [1, 2])
    def test_is_rounded_once(self, dtype, bias, addend, pairs):
        factors = [(draw(6, 9, seed=n).to(dtype), draw(9, 5, seed=n + 9).to(dtype)) for n in range(pairs)]
        b = draw(5, seed=20).to(dtype) if bias else None
        plus = draw(6, 5, seed=21).float() if addend else None
        exact = sum(a.double() @ c.double() for a, c in factors)
        exact = exact + (0 if b is None else b.double()) + (0 if plus is None else plus.double())
        found = sum_of_products(factors, b, plus)
        assert found.dtype == dtype
        # half a unit of the result, and a little for the order of summation in float32
        assert ((found.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()

    @pytest.mark.usefixtures("anywhere")
    @pytest.mark.parametrize("addend", [True, False])
    def test_block_by_block(self, monkeypatch, addend):
        monkeypatch.setattr(bf16, "_BLOCK", 4)
        a, b = draw(10, 9).bfloat16(), draw(9, 5, seed=1).bfloat16()
        plus = draw(5, 10, seed=2).float().T if addend else None
        exact = a.double() @ b.double() + (0 if plus is None else plus.double())
        torch.testing.assert_close(sum_of_products([(a, b)], None, plus), exact.bfloat16())
        assert sum_of_products([(a[:0], b)], None, None if plus is None else plus[:0]).shape == (0, 5)

    @pytest.mark.usefixtures("anywhere")
    def test_small_updates_are_not_lost(self):
        """The update is a fifth of half a unit of the base's output: rounded twice, none of it would be left."""
        torch.manual_seed(0)
        x, W = torch.randn(2048, 256).bfloat16(), (torch.randn(256, 1024) * 0.02).bfloat16()
        update = (torch.full((256, 1024), 1e-5) * torch.randn(1, 1024).sign()).bfloat16()
        frozen, adapted = x @ W, sum_of_products([(x, W), (x, update)], None)
        expected = x.double() @ update.double()
        assert expected.abs().median() < 0.2 * (torch.finfo(torch.bfloat16).eps / 2) * frozen.abs().median()
        moved = adapted.double() - frozen.double()
        assert (moved * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.01)
        twice = torch.addmm(frozen, x, update).double() - frozen.double()
        assert (twice * expected).sum() / expected.square().sum() < 0.5


def test_what_is_written_to_is_float32_whatever_the_default():
    with default_dtype(torch.float64), torch.device("meta"):
        start = bf16._start(None, 2, 3)
    assert (start.dtype, start.device.type) == (torch.float32, "cpu")
