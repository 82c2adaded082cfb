"""Scaling adapters up and down."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.helpers import rescale_adapter_scale
from torch import nn

from randlora import RandLoraConfig, get_peft_model

from .helpers import STACK_TARGETS, assert_close, conv_stack, layers_of, output, randomise, stack

SCALES = st.floats(-4, 4).filter(lambda scale: abs(scale) > 0.01)


def adapted(build=stack, **config):
    """Adapters x (everywhere) and y (on two of three layers); x is active."""
    config = {"randlora_alpha": 8, **config}
    model = get_peft_model(build(), RandLoraConfig(r=4, target_modules=STACK_TARGETS, **config), "x")
    model.add_adapter("y", RandLoraConfig(r=3, randlora_alpha=6, target_modules=["tall", "wide"]))
    return randomise(randomise(model, "x"), "y", seed=4).eval()


def with_updates(factors, build=stack):
    """The plain model plus the updates of the adapters, each times its factor."""
    model, plain = adapted(build), build()
    with torch.no_grad():
        for name, layer in layers_of(model.base_model.model).items():
            for adapter, factor in factors.items():
                if adapter in layer.r:
                    plain.get_submodule(name).weight += factor * layer.get_delta_weight(adapter)
    return output(plain).detach()


@given(st.lists(SCALES, max_size=4), SCALES, st.sampled_from([stack, conv_stack]))
def test_scales_multiply_and_set_scale_starts_again(scales, last, build):
    model = adapted(build)
    total = 1.0
    for scale in scales:
        total *= scale
        for layer in layers_of(model).values():
            layer.scale_layer(scale)
    assert_close(output(model).detach(), with_updates({"x": total}, build), 1e-4)
    for layer in layers_of(model).values():
        layer.set_scale("x", last)
    assert_close(output(model).detach(), with_updates({"x": last}, build), 1e-4)
    for scale in scales:
        for layer in layers_of(model).values():
            layer.unscale_layer(scale)
    assert_close(output(model).detach(), with_updates({"x": last / total}, build), 1e-4)
    for layer in layers_of(model).values():
        layer.unscale_layer()
    assert torch.equal(output(model), output(adapted(build)))


def test_all_active_adapters_and_no_other_are_scaled():
    model = adapted()
    before = {name: dict(layer.scaling) for name, layer in layers_of(model).items()}
    for layer in layers_of(model).values():
        layer.scale_layer(3)
    for name, layer in layers_of(model).items():
        assert layer.scaling == before[name] | {"x": 3 * before[name]["x"]}
    model.base_model.set_adapter(["x", "y"])
    for layer in layers_of(model).values():
        layer.unscale_layer()
        layer.scale_layer(0.5)
    assert_close(output(model).detach(), with_updates({"x": 0.5, "y": 0.5}), 1e-5)


def test_an_adapter_that_a_layer_lacks_is_passed_over():
    model = adapted()
    before = output(model)
    for layer in layers_of(model).values():
        layer.set_scale("y", 2.0)
        layer.set_scale("nobody", 2.0)
    assert torch.equal(output(model), before)


def test_delta_weight_and_merging_follow_the_scale():
    model = adapted()
    for layer in layers_of(model).values():
        layer.set_scale("x", -0.5)
    expected = with_updates({"x": -0.5})
    model.merge_adapter()
    assert_close(output(model).detach(), expected, 1e-5)
    model.unmerge_adapter()
    for layer in layers_of(model).values():
        layer.unscale_layer()
    assert torch.equal(output(model), output(adapted()))


def test_a_scale_is_not_saved(tmp_path):
    model = adapted()
    before = output(model)
    for layer in layers_of(model).values():
        layer.set_scale("x", 0.25)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(stack(), tmp_path / "x")), before)


@pytest.mark.parametrize("build", [stack, conv_stack])
@pytest.mark.parametrize("multiplier", [0, 0.5, -1, 2])
class TestRescaleAdapterScale:
    def test_within_the_context(self, build, multiplier):
        model = adapted(build)
        before = output(model)
        with rescale_adapter_scale(model, multiplier):
            assert_close(output(model).detach(), with_updates({"x": multiplier}, build), 1e-5)
        assert torch.equal(output(model), before)

    def test_after_an_error(self, build, multiplier):
        model = adapted(build)
        before = output(model)
        with pytest.raises(RuntimeError, match="on purpose"), rescale_adapter_scale(model, multiplier):
            raise RuntimeError("on purpose")
        assert torch.equal(output(model), before)


def test_rescale_still_works_for_lora_and_refuses_other_models():
    model = get_peft_model(stack(), LoraConfig(r=2, target_modules=["tall"], init_lora_weights=False))
    before = output(model)
    with rescale_adapter_scale(model, 0.0):
        assert_close(output(model).detach(), output(stack()).detach(), 1e-6)
    assert torch.equal(output(model), before)
    with pytest.raises(ValueError, match="scaling is only supported"), rescale_adapter_scale(nn.Linear(2, 2), 0.5):
        pass


def test_papers_scaling_is_kept_through_a_file(tmp_path):
    model = adapted(randlora_scaling="paper")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stack(), tmp_path / "x", adapter_name="x")
    for layer in layers_of(loaded).values():
        layer.set_scale("x", 1.0)
    assert_close(output(loaded).detach(), output(model).detach(), 1e-6)
