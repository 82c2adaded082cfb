"""Sums of adapters: exact where they are adapters, refused or fitted where they are not."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from randlora import CombinationError, RandLoraConfig, get_peft_model

from ..helpers import (
    LLAMA_TARGETS,
    STACK_TARGETS,
    assert_close,
    assert_same_tensors,
    conv_stack,
    layers_of,
    llama,
    output,
    randomise,
    snapshot,
    stack,
)
from ..layers.test_attention import encoder, x

WEIGHTS = st.floats(-3, 3).filter(lambda weight: abs(weight) > 0.05)
SHARED = st.sampled_from(["lambda", "gamma"])


class Experts(nn.Module):
    """Three matrices in one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 7, 5))


def adapted(count=2, share=None, build=stack, targets=STACK_TARGETS, **config):
    """Adapters p, q, s, t with the same bases, which share λ, γ or nothing."""
    model = get_peft_model(build(), RandLoraConfig(r=4, randlora_alpha=8, target_modules=targets, **config), "p")
    for name in "qst"[: count - 1]:
        # another alpha, hence another factor of the update
        config = {**config, "randlora_alpha": 8 + ord(name)}
        model.add_adapter(name, RandLoraConfig(r=4, target_modules=targets, **config))
    for name in "pqst"[:count]:
        randomise(model, name, seed=ord(name))
        for layer in layers_of(model).values() if share else ():
            shared = getattr(layer, f"randlora_{share}")
            shared[name].data = shared["p"].data.clone()
    return model.eval()


def total(model, weights):
    """What the sum of the updates makes of each layer, in float64."""
    return {
        name: sum(w * layer.get_delta_weight(a).double() for a, w in weights.items() if a in layer.r)
        for name, layer in layers_of(model).items()
    }


def assert_is_sum(model, name, weights, tolerance=1e-5):
    for layer, expected in total(model, weights).items():
        assert_close(layers_of(model)[layer].get_delta_weight(name).detach(), expected.detach(), tolerance, layer)


class TestLinear:
    @given(st.lists(WEIGHTS, min_size=1, max_size=4), SHARED, st.sampled_from([stack, conv_stack]))
    def test_exact_for_adapters_that_share_lambda_or_gamma(self, weights, share, build):
        weight_of = dict(zip("pqst", weights, strict=False))
        model = adapted(len(weights), share, build)
        errors = model.add_weighted_adapter(list(weight_of), weights, "sum")
        for name, expected in total(model.base_model.model, weight_of).items():
            layer = getattr(model.base_model.model, name)
            # the terms may cancel, and rounding is that of the terms
            terms = sum(abs(w) * layer.get_delta_weight(a).norm() for a, w in weight_of.items())
            assert (layer.get_delta_weight("sum") - expected).norm() <= 1e-6 * terms
            assert errors[name] <= 2e-6 * terms / expected.norm()

    @given(WEIGHTS)
    def test_one_adapter_is_rescaled(self, weight):
        model = adapted(1)
        model.add_weighted_adapter(["p"], [weight], "scaled")
        assert_is_sum(model, "scaled", {"p": weight})

    def test_a_factor_for_each_basis_does_no_harm(self):
        model = adapted(2, "gamma")
        for layer in layers_of(model).values():
            factors = torch.linspace(-2, 3, layer.num_bases["q"]) + 0.1
            layer.randlora_gamma["q"].data *= factors[:, None]
            layer.randlora_lambda["q"].data /= factors
        model.add_weighted_adapter(["p", "q"], [1.0, 0.5], "sum")
        assert_is_sum(model, "sum", {"p": 1.0, "q": 0.5})

    def test_shared_gamma_is_kept(self):
        model = adapted(2, "gamma")
        model.add_weighted_adapter(["p", "q"], [0.5, 2.0], "sum")
        for layer in layers_of(model).values():
            assert_close(layer.randlora_gamma["sum"].detach(), layer.randlora_gamma["p"].detach(), 1e-6)

    def test_adapters_of_a_whole_model_and_their_mean(self):
        model = adapted(3, "gamma", llama, LLAMA_TARGETS)
        model.add_weighted_adapter(["p", "q", "s"], [1 / 3] * 3, "mean")
        assert_is_sum(model, "mean", dict.fromkeys("pqs", 1 / 3))

    def test_an_adapter_less_itself_is_nothing(self):
        model = adapted(1)
        model.add_adapter("twin", RandLoraConfig(r=4, randlora_alpha=8, target_modules=STACK_TARGETS))
        for layer in layers_of(model).values():
            layer.randlora_lambda["twin"].data.copy_(layer.randlora_lambda["p"])
            layer.randlora_gamma["twin"].data.copy_(layer.randlora_gamma["p"])
        model.add_weighted_adapter(["p", "twin"], [1.0, -1.0], "nothing")
        model.set_adapter("nothing")
        assert_close(output(model).detach(), output(stack()).detach(), 1e-5)

    def test_adapters_that_have_not_been_trained(self):
        model = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS), "p")
        model.add_adapter("q", RandLoraConfig(r=4, target_modules=STACK_TARGETS))
        assert set(model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "sum").values()) == {0.0}
        model.set_adapter("sum")
        assert torch.equal(output(model), output(stack()))
        for layer in layers_of(model).values():  # and it can still be trained
            assert torch.equal(layer.randlora_gamma["sum"], layer.randlora_gamma["p"])

    @pytest.mark.parametrize("config", [{"sparse": True}, {"rank_pattern": {"wide": 2}}, {"randlora_scaling": "paper"}])
    def test_other_configs(self, config):
        model = adapted(2, "gamma", **config)
        model.add_weighted_adapter(["p", "q"], [0.5, 2.0], "sum")
        assert_is_sum(model, "sum", {"p": 0.5, "q": 2.0})

    def test_scales_that_were_set_count(self):
        model = adapted(2, "gamma")
        for layer in layers_of(model).values():
            layer.set_scale("p", 0.25)
        model.add_weighted_adapter(["p", "q"], [0.5, 2.0], "sum")
        assert_is_sum(model, "sum", {"p": 0.5, "q": 2.0})

    def test_an_adapter_named_twice_counts_twice(self):
        model = adapted(2)
        model.add_weighted_adapter(["p", "p"], [0.5, 2.0], "sum")
        assert_is_sum(model, "sum", {"p": 2.5})

    @pytest.mark.parametrize("config", [{}, {"rank_pattern": {"mlp.up_proj": 3}}], ids=str)
    def test_different_targets(self, config, tmp_path):
        """Each layer gets what there is for it; the bases, of the same sizes, are the same."""
        model = adapted(1, build=llama, targets=["q_proj", "up_proj"], **config)
        model.add_adapter("q", RandLoraConfig(r=4, target_modules=["o_proj", "up_proj"], **config))
        randomise(model, "q", seed=8)
        for layer in layers_of(model).values():
            if {"p", "q"} <= layer.r.keys():
                layer.randlora_gamma["q"].data.copy_(layer.randlora_gamma["p"])
        model.add_weighted_adapter(["p", "q"], [0.5, 2.0], "sum")
        assert_is_sum(model, "sum", {"p": 0.5, "q": 2.0})
        model.set_adapter("sum")
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "sum")
        assert torch.equal(output(loaded), output(model))

    def test_bases_that_the_union_would_not_define_are_saved(self, tmp_path):
        """Alone, each adapter's largest shape is 17×17; the bases come from a file that says so."""
        model = adapted(1, targets=["tall", "wide"], save_projection=False)
        model.add_adapter("q", RandLoraConfig(r=4, target_modules=["tall", "wide", "square"], save_projection=False))
        randomise(model, "q", seed=8)
        for layer in layers_of(model).values():
            if "p" in layer.r:
                layer.randlora_lambda["q"].data.copy_(layer.randlora_lambda["p"])
        model.add_weighted_adapter(["p", "q"], [0.5, 2.0], "sum")
        model.set_adapter("sum")
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        assert torch.equal(output(PeftModel.from_pretrained(stack(), tmp_path / "sum")), output(model))

    @pytest.mark.parametrize("first", [{}, {"target_modules": []}])
    def test_parameters_and_what_is_inside_of_their_modules(self, first, tmp_path):
        targets = {"target_modules": ["out_proj"], "target_parameters": ["in_proj_weight"]}
        model = get_peft_model(encoder(), RandLoraConfig(r=4, **targets | first), "p")
        model.add_adapter("q", RandLoraConfig(r=4, **targets))
        randomise(randomise(model, "p", seed=1), "q", seed=2)
        for layer in layers_of(model).values():
            if "p" in layer.r and "q" in layer.r:
                layer.randlora_gamma["q"].data = layer.randlora_gamma["p"].data.clone()
        model.base_model.add_weighted_adapter(["p", "q"], [0.5, 2.0], "sum")
        assert_is_sum(model, "sum", {"p": 0.5, "q": 2.0})
        model.set_adapter("sum")
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        alone = PeftModel.from_pretrained(encoder(), tmp_path / "sum").eval()
        assert_close(alone(x()).detach(), model.eval()(x()).detach(), 1e-5)

    def test_experts_are_summed_one_by_one(self):
        targets = {"target_modules": [], "target_parameters": ["experts.weight"]}
        model = get_peft_model(nn.ModuleDict({"experts": Experts()}), RandLoraConfig(r=2, **targets), "p")
        randomise(model, "p", seed=1)
        model.base_model.add_weighted_adapter(["p"], [-0.5], "sum")
        assert_is_sum(model, "sum", {"p": -0.5})

    def test_modules_to_save_are_combined_as_updates(self):
        model = adapted(2, "gamma", modules_to_save=["head"])
        head, plain = model.base_model.model.head, stack().head.weight
        for name, seed in (("p", 1), ("q", 2)):
            trained = torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed))
            head.modules_to_save[name].weight.data.copy_(trained)
        model.add_weighted_adapter(["p", "q"], [0.5, 2.0], "sum")
        changes = {name: head.modules_to_save[name].weight - plain for name in ("p", "q", "sum")}
        assert_close(changes["sum"].detach(), (0.5 * changes["p"] + 2.0 * changes["q"]).detach(), 1e-6)

    def test_the_new_adapter_is_an_adapter(self, tmp_path):
        model = adapted(2, "gamma")
        before, trainable = output(model), [name for name, p in model.named_parameters() if p.requires_grad]
        model.add_weighted_adapter(["p", "q"], [0.5, 2.0], "sum")
        assert torch.equal(output(model), before)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
        model.set_adapter("sum")
        expected = output(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(output(PeftModel.from_pretrained(stack(), tmp_path / "sum")), expected)
        output(model).square().sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith(".sum"))
        model.delete_adapter("sum")
        assert torch.equal(output(model), before)


class TestNearest:
    def test_its_error_is_said_and_true(self):
        model = adapted(2)
        with pytest.warns(UserWarning, match=r"miss \d.*% on average and .*% in '(tall|wide|square)'"):
            errors = model.add_weighted_adapter(["p", "q"], [1.0, 0.7], "near", "nearest")
        for name, expected in total(model.base_model.model, {"p": 1.0, "q": 0.7}).items():
            found = getattr(model.base_model.model, name).get_delta_weight("near").double()
            assert errors[name] == pytest.approx(((found - expected).norm() / expected.norm()).item(), rel=1e-4)
            assert 0.05 < errors[name] < 1

    def test_it_is_nearer_than_its_neighbours(self):
        """In coefficients; in updates on average over bases."""
        model = adapted(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(["p", "q"], [1.0, 0.7], "near", "nearest")
        generator = torch.Generator().manual_seed(0)
        for layer in layers_of(model).values():
            expected = sum(
                weight * layer.scaling[name] * torch.einsum("rn,nm->nrm", *parameters(layer, name))
                for name, weight in (("p", 1.0), ("q", 0.7))
            )
            lam, gamma = parameters(layer, "near")
            scaling = layer.scaling["near"]
            best = (scaling * torch.einsum("rn,nm->nrm", lam, gamma) - expected).norm()
            for _ in range(20):
                near = [p + 0.05 * p.std() * torch.randn(p.shape, generator=generator) for p in (lam, gamma)]
                assert (scaling * torch.einsum("rn,nm->nrm", *near) - expected).norm() > best

    def test_where_the_sum_is_an_adapter_it_is_the_sum(self):
        model = adapted(2, "gamma")
        with pytest.warns(UserWarning, match="nearest coefficients"):
            model.add_weighted_adapter(["p", "q"], [1.0, 0.7], "near", "nearest")
        assert_is_sum(model, "near", {"p": 1.0, "q": 0.7})


def parameters(layer, name):
    return layer.randlora_lambda[name].detach().double(), layer.randlora_gamma[name].detach().double()


class TestRefused:
    def _refused(self, model, match, adapters=("p", "q"), weights=(1.0, 1.0), name="sum", kind="linear"):
        state, configs, before = snapshot(model), set(model.peft_config), output(model)
        with pytest.raises(CombinationError, match=match) as raised:
            model.add_weighted_adapter(list(adapters), list(weights), name, kind)
        assert_same_tensors(model.state_dict(), state)
        assert set(model.peft_config) == configs
        assert torch.equal(output(model), before)
        return str(raised.value)

    def test_a_sum_that_is_no_adapter(self):
        message = self._refused(adapted(2), "share neither λ nor γ")
        for way_out in ("nearest", "to_lora", "merge_adapter"):
            assert way_out in message

    @pytest.mark.parametrize(
        ("kind", "why"), [("svd", "LoRA adapter"), ("cat", "number of bases"), ("ties", "entries"), ("x", "unknown")]
    )
    def test_kinds_that_give_no_adapter(self, kind, why):
        assert "nearest" in self._refused(adapted(2), why, kind=kind)

    @pytest.mark.parametrize("config", [{"projection_prng_key": 1}, {"sparse": True}, {"r": 3}], ids=str)
    def test_other_bases(self, config):
        model = adapted(1)
        model.add_adapter("q", RandLoraConfig(**{"r": 4, "target_modules": STACK_TARGETS, **config}))
        assert "merge_adapter" in self._refused(model, "different bases")

    @pytest.mark.parametrize(("adapters", "weights"), [((), ()), (("p",), (1.0, 2.0)), (("p", "q"), (1.0,))])
    def test_numbers_that_do_not_match(self, adapters, weights):
        self._refused(adapted(2), "one weight for each", adapters, weights)

    def test_names(self):
        self._refused(adapted(2), "no adapter 'z'", ("p", "z"))
        self._refused(adapted(2), "'q' already", name="q")

    def test_biases(self):
        self._refused(adapted(1, bias="all"), "bias='all'", ("p",), (1.0,))

    def test_a_failure_half_way_leaves_no_trace(self, monkeypatch):
        model = adapted(2, "gamma", modules_to_save=["head"])
        state, before = snapshot(model), output(model)

        def fail(*args):
            raise MemoryError("on purpose")

        monkeypatch.setattr("randlora.tuner.adapters.weighted_sum._combine_modules_to_save", fail)
        with pytest.raises(MemoryError):
            model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "sum")
        assert_same_tensors(model.state_dict(), state)
        assert torch.equal(output(model), before)
        assert set(model.peft_config) == {"p", "q"}
