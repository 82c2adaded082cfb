"""How far half precision is from the formula in float64, as docs/coming_from_peft.md says."""

import pytest
import torch
from torch import nn

from randlora.ops import naive

from .helpers import ours, randomise

TARGET = {"target_modules": ["0"], "r": 16, "randlora_alpha": 16}


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(256, 256), (320, 128), (128, 320)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str
)
def test_errors_from_float64(dtype, tolerance, shape):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape, bias=False)).to(dtype)
    layer = randomise(ours(base, **TARGET)).model[0]
    lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    assert lam.dtype == gamma.dtype == torch.float32
    x, dy = torch.randn(64, shape[0]).to(dtype), torch.randn(64, shape[1]).to(dtype)

    exact = [p.detach().double().requires_grad_() for p in (lam, gamma)]
    A, B = layer.basis("default").tensors(torch.device("cpu"), torch.float64)
    delta = naive.delta_weight(A, B, *exact, layer.scaling["default"], *reversed(shape))
    expected = x.double() @ (base[0].base_layer.weight.double() + delta).T
    expected.backward(dy.double())
    y = layer(x)
    y.backward(dy)

    assert y.dtype == dtype
    assert lam.grad.dtype == gamma.grad.dtype == torch.float32
    assert relative(y, expected) < tolerance
    assert relative(lam.grad, exact[0].grad) < tolerance
    assert relative(gamma.grad, exact[1].grad) < tolerance
