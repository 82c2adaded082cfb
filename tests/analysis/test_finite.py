"""Which layer is not finite is named, and nothing of the model changes by looking."""

import pytest
import torch

from randlora.analysis import first_not_finite
from tuner.helpers import STACK_TARGETS, features, ours, output, randomise, stack


@pytest.fixture
def model():
    return randomise(ours(stack(), target_modules=STACK_TARGETS, r=4))


def test_a_finite_model_has_none(model):
    output(model).sum().backward()
    assert first_not_finite(model) is None
    assert first_not_finite(model, features()) is None


@pytest.mark.parametrize(("parameter", "symbol"), [("randlora_lambda", "λ"), ("randlora_gamma", "γ")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_parameters_and_their_gradients(model, parameter, symbol, value):
    output(model).sum().backward()
    held = getattr(model.model.wide, parameter)["default"]
    held.grad[0, 0] = value
    assert first_not_finite(model) == f"the gradient of {symbol} of adapter 'default' in model.wide"
    held.data[0, 0] = value
    assert first_not_finite(model) == f"{symbol} of adapter 'default' in model.wide"


def test_the_layer_that_overflows_not_those_after_it(model):
    """In float16 the base product of one layer is out of range; what follows gets infinity as its input."""
    model.half()
    model.model.wide.base_layer.weight.data.fill_(60000)
    x = torch.ones(2, 10, dtype=torch.float16)
    assert first_not_finite(model) is None
    assert first_not_finite(model, x) == "the output of model.wide with adapters 'default'"
    assert not model.model.wide._forward_hooks
