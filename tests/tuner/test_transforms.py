"""What torch does with a whole model: functional calls, export, gradient scaling."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from randlora import RandLoraConfig, get_peft_model

from .helpers import LLAMA_TARGETS, STACK_TARGETS, assert_close, features, gradients, llama, randomise, stack, tokens


def adapted(build=stack, targets=STACK_TARGETS):
    return randomise(get_peft_model(build(), RandLoraConfig(r=4, randlora_alpha=4, target_modules=targets)))


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


class TestFunctional:
    def test_parameters_from_outside_take_the_place_of_those_inside(self):
        model, other = adapted(), randomise(adapted(), seed=11)
        assert not torch.equal(model(features()), other(features()))
        found = functional_call(model, trained(other), (features(),))
        assert_close(found.detach(), other(features()).detach(), 1e-6)

    def test_gradients_are_those_of_backward(self):
        model = adapted()
        found = grad(lambda p: functional_call(model, p, (features(),)).square().sum())(trained(model))
        model(features()).square().sum().backward()
        for name, expected in gradients(model).items():
            assert_close(found[name], expected, 1e-5, name)

    def test_gradients_of_each_sample(self):
        model = adapted()

        def loss(parameters, x):
            return functional_call(model, parameters, (x[None],)).square().sum()

        found = vmap(grad(loss), in_dims=(None, 0))(trained(model), features())
        for i, x in enumerate(features()):
            model.zero_grad()
            model(x[None]).square().sum().backward()
            for name, expected in gradients(model).items():
                assert_close(found[name][i], expected, 1e-4, name)


def test_a_merged_model_is_exported():
    model = adapted().eval()
    expected = model(features()).detach()
    program = torch.export.export(model.merge_and_unload(), (features(),))
    assert_close(program.module()(features()).detach(), expected, 1e-5)


def test_an_adapted_model_is_exported_too():
    model = adapted().eval()
    with torch.no_grad():
        program = torch.export.export(model.get_base_model(), (features(),))
        assert_close(program.module()(features()), model(features()), 1e-5)


def test_half_precision_with_scaled_gradients():
    model, plain = (adapted(llama, LLAMA_TARGETS) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch.autocast("cpu", torch.float16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    expected = plain(input_ids=tokens(), labels=tokens()).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for name, gradient in gradients(plain).items():
        assert_close(gradients(model)[name], gradient, 5e-2, name)
    before = trained(model)["base_model.model.model.layers.0.mlp.up_proj.randlora_gamma.default"].clone()
    scaler.step(optimizer)
    scaler.update()
    after = trained(model)["base_model.model.model.layers.0.mlp.up_proj.randlora_gamma.default"]
    assert not torch.equal(after, before)
    assert after.dtype == torch.float32
