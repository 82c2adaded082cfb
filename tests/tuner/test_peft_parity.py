"""The same λ and γ give what PEFT's own RandLora gives: outputs, every gradient, every training step."""

import pytest
import torch

from .helpers import (
    LLAMA_TARGETS,
    MODELS,
    STACK_TARGETS,
    assert_close,
    gradients,
    layers_of,
    llama,
    output,
    side_by_side,
    stack,
)

BASES = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bases", BASES)
@PRECISIONS
def test_output_and_every_gradient_by_name(name, bases, dtype, tolerance):
    build, targets = MODELS[name]
    theirs, ours = side_by_side(build, dtype, r=5, randlora_alpha=12, target_modules=targets, **BASES[bases])
    expected, found = output(theirs, dtype), output(ours, dtype)
    assert found.dtype == expected.dtype == dtype
    assert_close(found.detach(), expected.detach(), tolerance, "output")

    weights = torch.linspace(-1, 2, found.numel(), dtype=dtype).view(found.shape)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    their_gradients, our_gradients = gradients(theirs), gradients(ours)
    assert our_gradients.keys() == their_gradients.keys()
    assert len(our_gradients) == 2 * len(layers_of(ours)) >= 6
    for parameter, gradient in their_gradients.items():
        assert gradient.norm() > 0
        assert_close(our_gradients[parameter], gradient, tolerance, parameter)


@pytest.mark.parametrize("rank", [1, 7, 16, 40])
@PRECISIONS
def test_ranks(rank, dtype, tolerance):
    theirs, ours = side_by_side(stack, dtype, r=rank, randlora_alpha=2 * rank, target_modules=STACK_TARGETS)
    expected, found = output(theirs, dtype), output(ours, dtype)
    assert_close(found.detach(), expected.detach(), tolerance, "output")
    expected.square().sum().backward()
    found.square().sum().backward()
    for parameter, gradient in gradients(theirs).items():
        assert_close(gradients(ours)[parameter], gradient, tolerance, parameter)


@pytest.mark.parametrize("name", ["stack", "llama", "gpt2"])
@PRECISIONS
def test_training_stays_together(name, dtype, tolerance):
    build, targets = MODELS[name]
    models = side_by_side(build, dtype, r=4, randlora_alpha=8, target_modules=targets)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in models]
    losses = []
    for _ in range(6):
        step = []
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = (output(model, dtype) - 0.5).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step.append(loss.item())
        losses.append(step)
    assert losses[-1][0] < losses[0][0]
    for their_loss, our_loss in losses:
        assert our_loss == pytest.approx(their_loss, rel=10 * tolerance)
    parameters = dict(models[0].named_parameters())
    for parameter, value in models[1].named_parameters():
        assert_close(value.detach(), parameters[parameter].detach(), 10 * tolerance, parameter)


def test_initial_parameters_and_trainable_names_are_the_same():
    theirs, ours = side_by_side(llama, r=5, target_modules=LLAMA_TARGETS)
    for module in (*layers_of(ours).values(), *[m for m in theirs.modules() if hasattr(m, "randlora_lambda")]):
        module.reset_randlora_parameters("default")
    their_parameters, our_parameters = (dict(model.named_parameters()) for model in (theirs, ours))
    assert list(our_parameters) == list(their_parameters)
    for name, parameter in our_parameters.items():
        assert parameter.requires_grad == their_parameters[name].requires_grad, name
        assert torch.equal(parameter, their_parameters[name]), name


def test_attributes_that_users_know():
    theirs, ours = side_by_side(stack, r=4, randlora_alpha=6, target_modules=STACK_TARGETS)
    for name in STACK_TARGETS:
        their_layer, our_layer = (getattr(model.model, name) for model in (theirs, ours))
        for attribute in (
            "r",
            "scaling",
            "in_features",
            "out_features",
            "merged",
            "active_adapters",
            "merged_adapters",
        ):
            assert getattr(our_layer, attribute) == getattr(their_layer, attribute), attribute
        for attribute in ("randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma"):
            found, expected = getattr(our_layer, attribute), getattr(their_layer, attribute)
            assert "default" in found
            assert list(found.keys()) == list(expected.keys()) == ["default"]
            cut = tuple(slice(size) for size in found["default"].shape)  # what no layer reads is not kept
            assert torch.equal(found["default"].float(), expected["default"][cut].float()), attribute
        assert our_layer.adapter_layer_names == their_layer.adapter_layer_names
    for attribute in ("randlora_A", "randlora_B"):
        assert torch.equal(getattr(ours, attribute)["default"], getattr(ours.model.tall, attribute)["default"])
    assert ours.model.wide.basis("default") is ours.model.tall.basis("default")
    assert ours.prefix == theirs.prefix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_about_as_exact_as_peft(dtype, autocast):
    """PEFT computes the update in float32 on a CPU, we in the input's dtype; both round the sum to it."""
    config = {"r": 4, "randlora_alpha": 8, "target_modules": LLAMA_TARGETS}
    truth, _ = side_by_side(llama, torch.float64, **config)
    exact = output(truth).detach()
    errors = []
    for model in side_by_side(llama, torch.float32, **config):
        if not autocast:
            for name, parameter in model.named_parameters():
                if "randlora_" not in name:
                    parameter.data = parameter.data.to(dtype)
        with torch.autocast("cpu", dtype, enabled=autocast):
            errors.append((output(model).double() - exact).norm().item())
    assert errors[1] <= 2 * errors[0]
