"""Parameters as targets: stacks of experts, of which each has its own λ and γ."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from randlora import (
    ConfigError,
    PeftModel,
    RandLoraConfig,
    UnsupportedLayerError,
    get_peft_model,
)
from randlora.tuner.layers.parameter import ParamWrapper

from ..contract import Contract
from ..helpers import assert_close, assert_same_tensors, layers_of, ours, randomise, snapshot, tokens


class Experts(nn.Module):
    """Each sees every input."""

    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * 0.3)

    def forward(self, x):
        return torch.einsum("ti,eoi->teo", x, self.weight)


class TransposedExperts(Experts):
    is_transposed = True

    def forward(self, x):
        return torch.einsum("ti,eio->teo", x, self.weight)


class Matrix(Experts):
    def forward(self, x):
        return x @ self.weight.T


class ParameterContract(Contract):
    kind = ParamWrapper
    targets = {"target_modules": [], "target_parameters": ["0.weight"]}  # noqa: RUF012
    experts = 3

    def make_base(self):
        return Experts((self.experts, *self.shape))

    def input(self, dtype=torch.float32):
        return torch.randn(5, self.shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)

    def formula(self, layer, adapter, lam, gamma):
        one = super().formula
        return torch.stack([one(layer, adapter, *pair) for pair in zip(lam, gamma, strict=True)])

    def test_each_expert_has_its_own_parameters(self):
        layer = self.layer()
        assert layer.randlora_lambda["default"].shape[0] == layer.randlora_gamma["default"].shape[0] == self.experts
        update = layer.get_delta_weight("default").detach()
        with torch.no_grad():
            layer.randlora_lambda["default"][1] = 0
        changed = layer.get_delta_weight("default").detach()
        assert not changed[1].any()
        assert torch.equal(changed[::2], update[::2])


class TestTallExperts(ParameterContract):
    shape = (14, 9)


class TestWideExperts(ParameterContract):
    shape = (9, 14)


class TestTransposedExperts(ParameterContract):
    shape = (14, 9)

    def make_base(self):
        return TransposedExperts((self.experts, *self.shape[::-1]))

    def to_layout(self, update):
        return update.T


class TestMatrix(Contract):
    kind = ParamWrapper
    shape = (14, 9)
    targets = ParameterContract.targets
    input = ParameterContract.input

    def make_base(self):
        return Matrix(self.shape)


SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def mixtral(experts="eager"):
    torch.manual_seed(1)
    config = MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4, experts_implementation=experts)
    return MixtralForCausalLM(config).eval()


def gpt_oss(experts="eager"):
    torch.manual_seed(1)
    config = GptOssConfig(
        **SIZES, num_key_value_heads=1, head_dim=8, num_local_experts=4, experts_implementation=experts
    )
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def config(**changes):
    values = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "r": 4, "randlora_alpha": 4}
    return RandLoraConfig(**{**values, **changes})


def adapted(build=mixtral, experts="eager", **changes):
    return randomise(get_peft_model(build(experts), config(**changes))).eval()


def dense(model, build, experts="eager"):
    """The base model with W + ΔW written into it."""
    plain = build(experts)
    with torch.no_grad():
        for name, layer in layers_of(model.get_base_model()).items():
            module = plain.get_submodule(name.replace(".base_layer", ""))
            getattr(module, layer.parameter_name).add_(layer.get_delta_weight("default"))
    return plain


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
class TestModels:
    @pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
    def test_output_and_gradients(self, build, experts):
        model = adapted(build, experts)
        plain = dense(model, build, experts)
        loss, expected = (m(input_ids=tokens(), labels=tokens()).loss for m in (model, plain))
        assert_close(loss.detach(), expected.detach(), 1e-5)
        loss.backward()
        expected.backward()
        seen = 0
        for name, layer in layers_of(model.get_base_model()).items():
            module = plain.get_submodule(name.replace(".base_layer", ""))
            by_weight = getattr(module, layer.parameter_name).grad
            lam = layer.randlora_lambda["default"]
            (found,) = torch.autograd.grad(layer.get_delta_weight("default"), lam, by_weight)
            assert_close(lam.grad, found, 1e-4, name)
            seen += isinstance(layer, ParamWrapper)
        assert seen == 4

    def test_merging_and_unloading(self, build):
        model = adapted(build)
        state, expected = snapshot(model), model(input_ids=tokens()).logits.detach()
        model.merge_adapter()
        assert_close(model(input_ids=tokens()).logits.detach(), expected, 1e-5)
        model.unmerge_adapter()
        assert_same_tensors(model.state_dict(), state)
        merged = model.merge_and_unload()
        assert list(merged.state_dict()) == list(build().state_dict())
        assert_close(merged(input_ids=tokens()).logits.detach(), expected, 1e-5)

    def test_unloading_leaves_the_base_model(self, build):
        base = adapted(build).unload()
        assert_same_tensors(base.state_dict(), build().state_dict())

    @pytest.mark.parametrize("scaling", ["peft", "paper"])
    def test_save_and_load(self, build, scaling, tmp_path):
        model = adapted(build, randlora_scaling=scaling)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(build(), tmp_path).eval()
        assert again.peft_config["default"].target_parameters == PARAMETERS
        expected = model(input_ids=tokens()).logits.detach()
        assert_close(again(input_ids=tokens()).logits.detach(), expected, 1e-5)


def test_without_modules_only_the_parameters_are_adapted():
    model = adapted(target_modules=[])
    assert {type(layer) for layer in layers_of(model).values()} == {ParamWrapper}
    assert_close(model(input_ids=tokens()).logits.detach(), dense(model, mixtral)(input_ids=tokens()).logits, 1e-5)


def test_several_adapters():
    model = adapted()
    alone = model(input_ids=tokens()).logits
    model.add_adapter("second", config(r=3, projection_prng_key=5))
    randomise(model, "second", seed=9)
    assert torch.equal(model(input_ids=tokens()).logits, alone)
    model.set_adapter("second")
    assert not torch.allclose(model(input_ids=tokens()).logits, alone)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens()).logits, mixtral()(input_ids=tokens()).logits)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(input_ids=tokens()).logits, alone)


def test_a_second_adapter_of_other_parameters_is_refused_and_leaves_the_first():
    model = adapted()
    expected = model(input_ids=tokens()).logits
    with pytest.raises(ConfigError, match="differ from those of the adapter 'default'"):
        model.add_adapter("second", config(target_parameters=PARAMETERS[:1]))
    assert torch.equal(model(input_ids=tokens()).logits, expected)


def test_a_failed_injection_leaves_the_model_alone():
    base = mixtral()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(UnsupportedLayerError, match="neither a matrix"):
        ours(base, target_modules=[], target_parameters=[*PARAMETERS, "norm.weight"])
    assert [name for name, _ in base.named_modules()] == names


def test_a_vector_is_refused_by_name():
    with pytest.raises(UnsupportedLayerError, match=r"'model\.norm\.weight' of shape \(16,\)"):
        ours(mixtral(), target_modules=[], target_parameters=["model.norm.weight"])


def test_dropout_is_refused():
    with pytest.raises(ConfigError, match=r"randlora_dropout=0\.1 cannot be applied to target_parameters"):
        config(randlora_dropout=0.1)


def test_ranks_by_name_and_trained_checkpointed():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*match")
        model = adapted(rank_pattern={"experts.down_proj": 3}).train()
    assert {layer.r["default"] for layer in layers_of(model).values()} == {3, 4}
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    for m in (model, twin):
        m(input_ids=tokens(), labels=tokens()).loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_close(q.grad, p.grad, 1e-5, name)
