"""Adapted layers answer for the layers that they stand for."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from randlora import RandLoraConfig, get_peft_model

from ..helpers import assert_close, conv1d, features, ours, randomise, stack

KINDS = {
    "Linear": (lambda: nn.Linear(10, 8), ("in_features", "out_features")),
    "Conv1D": (lambda: conv1d(10, 8), ("nf", "nx")),
    "Conv2d": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    ),
    "Embedding": (
        lambda: Gemma3TextScaledWordEmbedding(9, 6, padding_idx=2, embed_scale=3.0),
        ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "scale_grad_by_freq", "sparse", "embed_scale"),
    ),
}


def layer_of(base):
    return ours(nn.Sequential(base), r=4, target_modules=["0"]).model[0]


@pytest.mark.parametrize("kind", KINDS)
class TestAttributes:
    def test_those_of_the_base_layer_are_its_own(self, kind):
        build, names = KINDS[kind]
        base = build()
        layer = layer_of(base)
        for name in names:
            if name in ("in_features", "out_features"):
                assert getattr(layer, name) == getattr(base, name)
            else:
                assert getattr(layer, name) is getattr(base, name), name
        base.added = object()
        assert layer.added is base.added

    def test_copies_answer_for_their_own_base_layer(self, kind):
        build, names = KINDS[kind]
        layer = layer_of(build())
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            twin.base_layer.added = 5
            assert getattr(twin, names[-1]) == getattr(layer, names[-1])
            assert twin.added == 5
            assert not hasattr(layer, "added")

    def test_what_neither_has_is_said_of_the_layer(self, kind):
        layer = layer_of(KINDS[kind][0]())
        with pytest.raises(AttributeError, match=rf"'{type(layer).__name__}' object has no attribute 'nonsense'"):
            _ = layer.nonsense

    def test_private_attributes_are_not_the_layers(self, kind):
        """Accelerate and torch mark modules so, and would take the wrapper for the module that they have marked."""
        base = KINDS[kind][0]()
        layer = layer_of(base)
        base._hf_hook = object()
        assert not hasattr(layer, "_hf_hook")

    def test_input_dtype_casting_is_disabled_as_for_lora(self, kind):
        model = ours(nn.Sequential(KINDS[kind][0]()), r=4, target_modules=["0"])
        with disable_input_dtype_casting(model):
            assert model.model[0].cast_input_dtype_enabled is False
        assert model.model[0].cast_input_dtype_enabled is True


def test_without_casting_the_input_is_computed_in_its_dtype():
    """As diffusers' layerwise casting has it: weights are stored in one dtype, and cast for the call by hooks."""
    base = nn.Linear(10, 8)
    model = randomise(ours(nn.Sequential(base), r=4, target_modules=["0"]))
    x = features()
    expected = model(x).detach()
    base.to(torch.bfloat16)
    rounded = expected - x @ (model.model[0].get_delta_weight("default").detach().T)
    base.register_forward_pre_hook(lambda module, args: module.to(torch.float32) and None)
    base.register_forward_hook(lambda module, args, output: module.to(torch.bfloat16) and None)
    with disable_input_dtype_casting(model):
        found = model(x).detach()
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 5e-3 * rounded.norm()
    assert base.weight.dtype == torch.bfloat16


class TestTraced:
    """``torch.jit.trace`` in evaluation, where layers keep sums between calls."""

    def test_the_traced_model_follows_its_parameters(self):
        """No sum of W and ΔW has become a constant of it."""
        model = randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=["tall"]))).eval()
        model = model.get_base_model()
        x = features(batch=(600,))
        with torch.no_grad():
            for _ in range(3):
                model(x)
            traced = torch.jit.trace(model, x)
            randomise(model, seed=11)
            assert_close(traced(x), model(x), 1e-5)


def test_lora_beside_it_has_the_same_attributes_at_the_same_places():
    """A model that reads them of a LoRA reads them of ours."""
    lora = get_peft_model(nn.Sequential(nn.Linear(10, 8)), LoraConfig(r=4, target_modules=["0"])).base_model.model[0]
    layer = layer_of(nn.Linear(10, 8))
    for name in ("in_features", "out_features", "weight", "bias", "base_layer", "cast_input_dtype_enabled"):
        assert hasattr(lora, name), name
        assert hasattr(layer, name), name
