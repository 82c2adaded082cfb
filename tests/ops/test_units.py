"""In float16 neither x B leaves the range nor does Ã fall out of it."""

import pytest
import torch

from ops.test_linear import UNIFORM, plan_name
from randlora.ops import naive
from randlora.ops.bases import BasisSpec, Dense, Ternary, get_basis
from randlora.ops.linear import adapted_linear
from randlora.ops.operands import Sizes
from randlora.ops.plan import force
from randlora.ops.units import in_units, unit


def test_only_float16_has_a_unit_and_it_is_exact():
    B = torch.randn(50, 40).bfloat16()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8):
        assert unit(dtype) == 1
        assert torch.equal(in_units(B, dtype), B.to(dtype))
    assert torch.equal(in_units(B, torch.float16).double() / unit(torch.float16), B.half().double())


@pytest.mark.parametrize("kind", [Dense(), Ternary(3.0)], ids=["dense", "sparse"])
@pytest.mark.parametrize("plan", UNIFORM[:2], ids=plan_name)
@pytest.mark.parametrize(("out", "in_"), [(96, 600), (600, 96)], ids=["tall", "wide"])
@pytest.mark.parametrize(
    ("inputs", "lam", "scaling"),
    [(3000, 1e-4, 20.0), (1, 1e-5, 20.0), (1, 1e-2, 1 / 32)],
    ids=["large activations", "λ after a step", "small alpha"],
)
def test_float16_is_as_precise_as_its_roundings(kind, plan, out, in_, inputs, lam, scaling):
    """With B as it is, x B is infinite in the first case, and the update 2% wrong in the others."""
    m, M, r = 96, 600, 8
    basis = get_basis(BasisSpec(r, m, M, 1, kind, m, M))
    A, B = basis.tensors(torch.device("cpu"), torch.float64)
    x = (torch.randn(5, in_) * inputs).half()
    lam, gamma, g = torch.randn(r, m // r) * lam, torch.randn(m // r, m) / M, torch.randn(5, out).half() / 4
    x.requires_grad_()
    lam.requires_grad_()
    gamma.requires_grad_()
    with force(plan):
        bases = basis.operands(x.device, x.dtype, Sizes(M, m, m // r))
        y = adapted_linear(x, bases, lam, gamma, scaling * basis.factor, out)
        found = [y, *torch.autograd.grad(y, (x, lam, gamma), g)]
    exact = [t.detach().double().requires_grad_() for t in (x, lam, gamma)]
    y = exact[0] @ naive.delta_weight(A, B, *exact[1:], scaling, out, in_).T
    for name, value, expected in zip(
        ("y", "x", "lam", "gamma"), found, [y, *torch.autograd.grad(y, exact, g.double())], strict=True
    ):
        error = (value.double() - expected).norm()
        limit = 4 * torch.finfo(torch.float16).eps * expected.norm()
        if plan.output == "weight" and name in ("y", "x"):  # entries of ΔW are multiples of 2⁻²⁴ at best
            rows = x if name == "y" else g
            limit += 2**-25 * rows.double().norm() * expected.shape[1] ** 0.5
        assert error < limit, f"{name}: {error / expected.norm():.1e}"
