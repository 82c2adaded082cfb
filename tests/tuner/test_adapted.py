"""Which layers of a model are adapted, and what all kinds of layer share."""

import pytest
import torch
from torch import nn

from randlora import RandLoraLayer
from randlora.tuner.layers.base import AdaptedModule, adapted
from randlora.tuner.layers.conv import Conv1d, Conv2d, Conv3d
from randlora.tuner.layers.embedding import Embedding
from randlora.tuner.layers.linear import Linear, OutProjection
from randlora.tuner.layers.parameter import ParamWrapper
from randlora.tuner.layers.quantized import QuantizedLinear

from .helpers import STACK_TARGETS, ours, stack

KINDS = [Linear, OutProjection, QuantizedLinear, Conv1d, Conv2d, Conv3d, Embedding, ParamWrapper]


class TestAdapted:
    def model(self):
        model = ours(stack(), "first", target_modules=["tall", "wide"], r=2)
        model.peft_config["second"] = type(model.peft_config["first"])(target_modules=["wide", "square"], r=2)
        model.inject_adapter(model.model, "second")
        return model.model

    def test_by_name_and_adapter(self):
        model = self.model()
        assert list(adapted(model)) == STACK_TARGETS
        assert list(adapted(model, "first")) == ["tall", "wide"]
        assert list(adapted(model, "second")) == ["wide", "square"]
        assert list(adapted(model, "first", "second")) == STACK_TARGETS
        assert adapted(model, "third") == {}
        assert adapted(model)["wide"] is model.wide

    def test_the_model_may_be_the_layer(self):
        model = self.model()
        assert adapted(model.tall) == {"": model.tall}
        assert adapted(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_the_forward_and_the_name_of_all(kind):
    assert issubclass(kind, RandLoraLayer)
    assert kind.__repr__ is AdaptedModule.__repr__
    if kind is not ParamWrapper:  # which takes whatever its module takes
        assert kind.forward is AdaptedModule.forward


def test_the_name_tells_whose_layer_it_is():
    model = ours(stack(), target_modules=["tall"], r=2).model
    assert repr(model.tall).startswith("randlora.Linear(\n")
    assert torch.equal(model.tall(torch.ones(1, 10)), model.tall.forward_with(["default"], torch.ones(1, 10)))
