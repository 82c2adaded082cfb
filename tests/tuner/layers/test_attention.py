"""Torch's own encoder: ``nn.MultiheadAttention`` calls none of its parts, the fast path none of its linear layers."""

import pytest
import torch
from torch import nn

from randlora import PeftModel, RandLoraConfig, UnsupportedLayerError, get_peft_model
from randlora.tuner.layers.linear import Linear, OutProjection
from randlora.tuner.layers.parameter import ParamWrapper

from ..helpers import assert_close, assert_same_tensors, layers_of, ours, randomise, snapshot

TARGETS = {"target_modules": ["out_proj"], "target_parameters": ["self_attn.in_proj_weight"]}


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, dim_feedforward=20, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def x():
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2))


def adapted(**targets):
    return randomise(get_peft_model(encoder(), RandLoraConfig(r=4, randlora_alpha=4, **(targets or TARGETS)))).eval()


def dense(model, adapter="default"):
    plain = encoder()
    with torch.no_grad():
        for name, layer in layers_of(model.get_base_model()).items():
            if adapter in layer.randlora_lambda:
                module = plain.get_submodule(name.replace(".base_layer", ""))
                getattr(module, layer.parameter_name).add_(layer.get_delta_weight(adapter))
    return plain


@pytest.mark.parametrize(
    "targets",
    [
        TARGETS,
        {"target_modules": ["out_proj"]},
        {**TARGETS, "target_modules": []},
        {"target_modules": ["linear1"]},
        {**TARGETS, "target_modules": ["linear1", "linear2", "out_proj"]},
    ],
)
class TestEncoder:
    @pytest.mark.parametrize("grad", [True, False])  # without gradients torch takes its fast path, past all modules
    def test_output(self, targets, grad):
        model = adapted(**targets)
        assert {type(layer) for layer in layers_of(model).values()} <= {Linear, OutProjection, ParamWrapper}
        with torch.set_grad_enabled(grad):
            found, base = model(x()), encoder()(x())
        assert_close(found.detach(), dense(model)(x()).detach(), 1e-5)
        assert not torch.allclose(found, base, atol=1e-3)

    def test_gradients(self, targets):
        model = adapted(**targets).train()
        plain = dense(model).train()
        # not the sum of squares, which the last norm makes a constant: its gradients would be rounding errors
        direction = torch.randn(x().shape, generator=torch.Generator().manual_seed(3))
        (model(x()) * direction).sum().backward()
        (plain(x()) * direction).sum().backward()
        for name, layer in layers_of(model.get_base_model()).items():
            by_weight = getattr(plain.get_submodule(name.replace(".base_layer", "")), layer.parameter_name).grad
            parameters = [layer.randlora_lambda["default"], layer.randlora_gamma["default"]]
            expected = torch.autograd.grad(layer.get_delta_weight("default"), parameters, by_weight)
            for parameter, gradient in zip(parameters, expected, strict=True):
                assert_close(parameter.grad, gradient, 1e-4, name)

    def test_merging_disabling_and_unloading(self, targets):
        model = adapted(**targets)
        state, expected = snapshot(model), model(x()).detach()
        model.merge_adapter()
        assert_close(model(x()).detach(), expected, 1e-5)
        model.unmerge_adapter()
        assert_same_tensors(model.state_dict(), state)
        with model.disable_adapter():
            assert_close(model(x()).detach(), encoder()(x()).detach(), 1e-5)
        merged = model.merge_and_unload()
        assert list(merged.state_dict()) == list(encoder().state_dict())
        assert_close(merged(x()).detach(), expected, 1e-5)

    def test_save_and_load(self, targets, tmp_path):
        model = adapted(**targets)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(encoder(), tmp_path).eval()
        assert_close(again(x()).detach(), model(x()).detach(), 1e-5)


def test_the_whole_module_is_refused_with_what_to_target_instead():
    with pytest.raises(UnsupportedLayerError) as caught:
        ours(encoder(), target_modules=["self_attn"])
    assert "target_parameters=['layers.0.self_attn.in_proj_weight']" in str(caught.value)
    assert "target_modules=['layers.0.self_attn.out_proj']" in str(caught.value)


def test_dropout_of_the_output_projection_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"randlora_dropout=0\.1 cannot be applied"):
        ours(encoder(), target_modules=["out_proj"], randlora_dropout=0.1)


def test_a_second_adapter_of_both_parameters():
    """PEFT passes over out_proj, which is inside of the module that the first adapter has wrapped."""
    model = adapted()
    model.add_adapter("second", RandLoraConfig(r=3, **TARGETS))
    randomise(model, "second", seed=8)
    found = {name: set(layer.randlora_lambda) for name, layer in layers_of(model).items()}
    assert len(found) == 4
    assert all(names == {"default", "second"} for names in found.values()), found
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".second"))
    model.set_adapter("second")
    assert_close(model.eval()(x()).detach(), dense(model, "second")(x()).detach(), 1e-5)


def test_an_adapter_inside_of_what_another_has_wrapped():
    model = adapted(**{**TARGETS, "target_modules": []}, bias="all")
    biases = {name for name, p in encoder().named_parameters() if name.endswith(".bias")}
    model.add_adapter("second", RandLoraConfig(r=3, target_modules=["self_attn.out_proj", "linear2"]))
    model.set_adapter("second")
    randomise(model, "second", seed=8)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(name.endswith(".bias") for name in trained) == len(biases)
    assert sum(name.endswith(".second") for name in trained) == len(trained) - len(biases) == 8
    assert_close(model.eval()(x()).detach(), dense(model, "second")(x()).detach(), 1e-5)
