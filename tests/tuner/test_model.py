"""Which modules are adapted and by what; several adapters in one model; failures that leave no trace."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from randlora import RandLoraConfig, RandLoraModel, UnsupportedLayerError, get_peft_model
from randlora.ops.bases import get_basis
from randlora.tuner.bases import define_bases

from .helpers import (
    LLAMA_TARGETS,
    STACK_TARGETS,
    Stack,
    assert_close,
    assert_same_tensors,
    bert,
    conv1d,
    conv_stack,
    features,
    gpt2,
    layers_of,
    llama,
    ours,
    output,
    randomise,
    snapshot,
    stack,
)


def adapted(model: nn.Module) -> list[str]:
    return sorted(name.removeprefix("model.") for name in layers_of(model))


TALL = {"r": 4, "target_modules": ["tall"]}


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "expected"),
        [
            (["tall"], ["tall"]),
            (["square", "tall"], ["square", "tall"]),
            (r"(tall|wide)", ["tall", "wide"]),
            (r".*a.*", ["head", "square", "tall"]),
            ("all-linear", ["head", "square", "tall", "wide"]),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("build", [stack, conv_stack])
    def test_names_expressions_and_all_linear(self, build, targets, expected):
        assert adapted(ours(build(), r=4, target_modules=targets)) == expected

    def test_all_linear_leaves_the_output_layer(self):
        found = adapted(ours(llama(), r=4, target_modules="all-linear"))
        assert len(found) == 14
        assert not any("lm_head" in name for name in found)
        found = adapted(ours(bert(), r=4, target_modules="all-linear", task_type="SEQ_CLS"))
        assert any(name.endswith("query") for name in found)
        assert "classifier" not in found

    @pytest.mark.parametrize(
        ("build", "expected"),
        [(llama, {"q_proj", "v_proj"}), (bert, {"query", "value"}), (gpt2, {"c_attn"})],
        ids=["llama", "bert", "gpt2"],
    )
    def test_defaults_by_architecture(self, build, expected):
        assert {name.rpartition(".")[2] for name in adapted(ours(build(), r=4))} == expected

    def test_no_default_for_an_unknown_architecture(self):
        with pytest.raises(ValueError, match="target_modules"):
            ours(stack(), r=4)

    @pytest.mark.parametrize("exclude", [["wide"], r"wi.*"])
    def test_exclude_modules(self, exclude):
        found = adapted(ours(stack(), r=4, target_modules=STACK_TARGETS, exclude_modules=exclude))
        assert found == ["square", "tall"]

    def test_layers_to_transform(self):
        found = adapted(ours(llama(), r=4, target_modules=["q_proj"], layers_to_transform=[1]))
        assert found == ["model.layers.1.self_attn.q_proj"]
        found = adapted(ours(llama(), r=4, target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers"))
        assert found == ["model.layers.0.self_attn.q_proj"]

    def test_nothing_matched_is_an_error(self):
        with pytest.raises(ValueError, match="not_there"):
            ours(stack(), r=4, target_modules=["not_there"])

    def test_bases_are_sized_by_the_adapted_layers_alone(self):
        model = ours(stack(), r=4, target_modules=["wide", "square"])
        assert model.model.wide.randlora_A["default"].shape == (4, 1, 9)
        assert model.model.wide.randlora_B["default"].shape == (17, 3, 4)

    def test_all_layers_share_one_pair(self):
        model = ours(llama(), r=4, target_modules=LLAMA_TARGETS)
        assert len({id(layer.bases["default"]) for layer in layers_of(model).values()}) == 1
        assert not list(model.buffers()) or not any("randlora" in name for name, _ in model.named_buffers())


class TestPatterns:
    def test_rank_and_alpha_by_name_and_expression(self):
        model = ours(
            stack(),
            r=4,
            randlora_alpha=8,
            target_modules=STACK_TARGETS,
            rank_pattern={"tall": 2, "sq.*": 5},
            alpha_pattern={"wide": 20},
        )
        assert {name: layer.r["default"] for name, layer in layers_of(model.model).items()} == {
            "tall": 2,
            "wide": 4,
            "square": 5,
        }
        assert {name: layer.scaling["default"] for name, layer in layers_of(model.model).items()} == {
            "tall": 4.0,
            "wide": 5.0,
            "square": 1.6,
        }
        assert model.model.tall.randlora_lambda["default"].shape == (2, 5)
        assert output(randomise(model)).isfinite().all()

    def test_layers_of_one_rank_share_and_others_have_their_own(self):
        model = ours(llama(), r=4, target_modules=LLAMA_TARGETS, rank_pattern={"mlp.up_proj": 3})
        by_rank = {}
        for layer in layers_of(model).values():
            by_rank.setdefault(layer.r["default"], set()).add(id(layer.bases["default"]))
        assert {rank: len(found) for rank, found in by_rank.items()} == {3: 1, 4: 1}
        assert set(model.randlora_A) == {"default"}
        assert model.randlora_A["default"].shape[0] == 4

    def test_a_pattern_changes_its_layer_alone(self):
        plain = randomise(ours(stack(), r=4, target_modules=STACK_TARGETS))
        changed = ours(stack(), r=4, target_modules=STACK_TARGETS, rank_pattern={"tall": 2})
        assert changed.model.wide.bases["default"] is plain.model.wide.bases["default"]


class TestKinds:
    @pytest.mark.parametrize(
        "module",
        [nn.ConvTranspose2d(3, 4, 2), nn.EmbeddingBag(5, 6), nn.LayerNorm(4), nn.Bilinear(3, 3, 3)],
        ids=lambda m: type(m).__name__,
    )
    def test_an_unsupported_kind_is_refused_by_name_and_leaves_the_model(self, module):
        model = nn.ModuleDict({"good": nn.Linear(4, 5), "bad": module, "last": nn.Linear(5, 4)})
        before, kinds = snapshot(model), [type(child) for child in model.children()]
        with pytest.raises(UnsupportedLayerError) as raised:
            ours(model, r=4, target_modules=["good", "bad", "last"])
        assert "'bad'" in str(raised.value)
        assert type(module).__name__ in str(raised.value)
        assert [type(child) for child in model.children()] == kinds
        assert_same_tensors(model.state_dict(), before)

    def test_rank_above_the_smaller_dimension_works_and_is_explained(self):
        with pytest.warns(UserWarning, match=r"r=10 is larger .* 2 of 3 adapted layers") as caught:
            model = RandLoraModel(stack(), RandLoraConfig(r=10, target_modules=["wide", "square", "tall"]), "default")
        message = str(caught[0].message)
        assert "single basis" in message
        assert "smaller r" in message
        assert output(randomise(model)).isfinite().all()

    def test_no_warning_where_the_rank_fits(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            RandLoraModel(stack(), RandLoraConfig(r=9, target_modules=STACK_TARGETS), "default")

    @pytest.mark.parametrize("fan_in_fan_out", [True, False])
    @pytest.mark.parametrize("build", [stack, conv_stack])
    def test_the_weight_layout_is_known_without_being_told(self, build, fan_in_fan_out):
        plain = randomise(ours(build(), r=4, target_modules=STACK_TARGETS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = randomise(ours(build(), r=4, target_modules=STACK_TARGETS, fan_in_fan_out=fan_in_fan_out))
        assert torch.equal(output(told), output(plain))
        told.merge_adapter()
        assert_close(output(told).detach(), output(plain).detach(), 1e-5)

    def test_a_flag_without_effect_is_named(self):
        with pytest.warns(UserWarning, match="fan_in_fan_out=True has no effect on 'tall'"):
            ours(stack(), r=4, target_modules=["tall"], fan_in_fan_out=True)

    def test_linear_and_conv1d_in_one_model(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), conv1d(9, 6))
        adapted_model = randomise(ours(model, r=4, target_modules=["0", "1"]))
        x = torch.randn(4, 6)
        before = adapted_model(x)
        adapted_model.merge_adapter()
        assert_close(adapted_model(x).detach(), before.detach(), 1e-5)


ADAPTERS = {
    "x": {"r": 4, "randlora_alpha": 8, "target_modules": STACK_TARGETS},
    "y": {"r": 7, "randlora_alpha": 3, "target_modules": ["tall", "wide"], "projection_prng_key": 5, "sparse": True},
    "z": {"r": 2, "randlora_alpha": 9, "target_modules": ["wide"], "save_projection": False, "sparsity": 2.5},
}


def alone(name: str):
    """A model with that adapter only."""
    return randomise(get_peft_model(stack(), RandLoraConfig(**ADAPTERS[name]), adapter_name=name), name, seed=ord(name))


def together(order=("x", "y", "z")):
    model = get_peft_model(stack(), RandLoraConfig(**ADAPTERS[order[0]]), adapter_name=order[0])
    for name in order[1:]:
        model.add_adapter(name, RandLoraConfig(**ADAPTERS[name]))
    for name in order:
        randomise(model, name, seed=ord(name))
    return model


class TestSeveralAdapters:
    @pytest.mark.parametrize("order", list(itertools.permutations("xyz")), ids="".join)
    def test_side_by_side_in_any_order(self, order):
        """Other ranks, keys, densities and targets: PEFT refuses or breaks the first one."""
        model = together(order)
        for name in "xyzxy":
            model.set_adapter(name)
            assert torch.equal(output(model), output(alone(name))), name

    def test_deleting_one_leaves_the_others(self):
        model = together()
        model.delete_adapter("x")
        assert set(model.peft_config) == {"y", "z"}
        for name in "yz":
            model.set_adapter(name)
            assert torch.equal(output(model), output(alone(name)))
        assert not any(".x" in name.rpartition("randlora_")[2] for name in model.state_dict() if "randlora_" in name)

    def test_a_deleted_name_can_be_used_again(self):
        model = together()
        model.set_adapter("y")
        model.delete_adapter("x")
        model.add_adapter("x", RandLoraConfig(**ADAPTERS["x"] | {"r": 3}))
        model.set_adapter("x")
        assert model.base_model.model.tall.r["x"] == 3
        assert output(randomise(model, "x")).isfinite().all()

    def test_updates_of_active_adapters_add_up_in_each_layer(self):
        model = together()
        model.base_model.set_adapter(["x", "y", "z"])
        plain = stack()
        with torch.no_grad():
            for name in STACK_TARGETS:
                for adapter in "xyz":
                    layer = getattr(alone(adapter).base_model.model, name)
                    if hasattr(layer, "randlora_lambda"):
                        getattr(plain, name).weight += layer.get_delta_weight(adapter)
        assert_close(output(model).detach(), output(plain).detach(), 1e-5)

    def test_only_the_active_adapter_trains(self):
        model = together()
        for active in "xyz":
            model.set_adapter(active)
            trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
            assert trainable == {active}

    def test_set_adapter_in_inference_mode_trains_nothing(self):
        model = together()
        model.set_adapter("y", inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())

    def test_a_new_adapter_starts_frozen_and_without_effect(self):
        model = together()
        before = output(model)
        model.add_adapter("w", RandLoraConfig(r=3, target_modules=["square", "head"]))
        assert torch.equal(output(model), before)
        assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".w"))

    def test_disable_adapter_context(self):
        model, plain = together(), output(stack())
        before = output(model)
        with model.disable_adapter():
            assert torch.equal(output(model), plain)
        assert torch.equal(output(model), before)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trainable
        assert all(name.endswith(".x") for name in trainable)

    def test_disable_and_enable_layers(self):
        model = together()
        before = output(model)
        model.base_model.disable_adapter_layers()
        assert torch.equal(output(model), output(stack()))
        model.base_model.enable_adapter_layers()
        assert torch.equal(output(model), before)

    def test_what_is_added_while_all_are_disabled_is_disabled_too(self):
        model, plain = get_peft_model(stack(), RandLoraConfig(**TALL), adapter_name="x"), output(stack())
        model.base_model.disable_adapter_layers()
        model.add_adapter("y", RandLoraConfig(r=4, target_modules=STACK_TARGETS, modules_to_save=["head"]))
        randomise(model, "y")
        model.set_adapter("y")
        with torch.no_grad():
            model.base_model.model.head.modules_to_save["y"].weight.add_(1)
        assert torch.equal(output(model), plain)
        model.base_model.enable_adapter_layers()
        assert not torch.allclose(output(model), plain)

    def test_they_share_a_basis_only_if_it_is_the_same(self):
        model = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS), adapter_name="x")
        same = {"r": 4, "target_modules": ["tall", "wide", "square"], "randlora_alpha": 3}
        model.add_adapter("same", RandLoraConfig(**same))
        model.add_adapter("other", RandLoraConfig(**same, projection_prng_key=1))
        bases = model.base_model.model.tall.bases
        assert bases["same"] is bases["x"]
        assert bases["other"] is not bases["x"]

    def test_unload_gives_the_base_model_back(self):
        plain = stack()
        model = together().unload()
        assert type(model) is Stack
        assert [type(child) for child in model.children()] == [nn.Linear] * 4
        assert_same_tensors(model.state_dict(), plain.state_dict())

    def test_modules_to_save_of_two_adapters(self):
        config = RandLoraConfig(r=4, target_modules=["tall"], modules_to_save=["head"])
        model = get_peft_model(stack(), config, adapter_name="x")
        model.add_adapter("y", RandLoraConfig(r=3, target_modules=["tall"], modules_to_save=["head"]))
        model.base_model.model.head.modules_to_save["y"].weight.data.zero_()
        model.base_model.model.head.modules_to_save["y"].bias.data.fill_(2.0)
        first = output(model)
        model.set_adapter("y")
        assert torch.equal(output(model), torch.full((6, 3), 2.0))
        model.set_adapter("x")
        assert torch.equal(output(model), first)

    def test_a_deep_copy_is_independent(self):
        model = together()
        twin = copy.deepcopy(model)
        before = output(twin)
        randomise(model, "x", seed=99)
        assert torch.equal(output(twin), before)
        assert twin.base_model.model.tall.bases["x"] is model.base_model.model.tall.bases["x"]


class TestDropout:
    def test_it_acts_in_training_only(self):
        config = {"r": 4, "randlora_alpha": 8, "target_modules": STACK_TARGETS}
        model = randomise(ours(stack(), randlora_dropout=0.5, **config))
        plain = randomise(ours(stack(), **config))
        model.eval()
        assert torch.equal(output(model), output(plain))
        model.train()
        torch.manual_seed(1)
        first, second = output(model), output(model)
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        assert torch.equal(output(model), first)

    def test_each_adapter_has_its_own(self):
        model = get_peft_model(stack(), RandLoraConfig(randlora_dropout=0.3, **TALL), adapter_name="x")
        model.add_adapter("y", RandLoraConfig(**TALL))
        dropout = model.base_model.model.tall.randlora_dropout
        assert isinstance(dropout["x"], nn.Dropout)
        assert dropout["x"].p == 0.3
        assert "y" not in dropout

    def test_adapters_of_one_probability_share_a_module(self):
        model = get_peft_model(stack(), RandLoraConfig(randlora_dropout=0.3, **TALL), adapter_name="x").eval()
        for name, probability in (("y", 0.3), ("z", 0.1), ("u", 0.1)):
            model.add_adapter(name, RandLoraConfig(randlora_dropout=probability, **TALL))
        dropout = model.base_model.model.tall.randlora_dropout
        assert dropout["x"] is dropout["y"] is not dropout["z"] is dropout["u"]
        assert [kind.p for kind in dropout.children()] == [0.3, 0.1]
        assert not dropout["z"].training  # as the model
        for name in ("x", "z", "u"):
            model.delete_adapter(name)
        assert [*dropout.children()] == [dropout["y"]]
        assert [*dropout.keys()] == ["y"]


class TestFailedInjection:
    def test_a_second_adapter_that_fails_leaves_the_first(self, monkeypatch):
        model = together(("x", "y"))
        before, state, names = output(model), snapshot(model), adapted(model)

        def fail(*args):
            raise MemoryError("no room for the bases")

        monkeypatch.setattr("randlora.tuner.bases.get_basis", fail)
        with pytest.raises(MemoryError):
            model.add_adapter("w", RandLoraConfig(r=3, target_modules=["tall", "head"]))
        monkeypatch.undo()
        assert adapted(model) == names
        assert type(model.base_model.model.head) is nn.Linear
        assert_same_tensors(model.state_dict(), state)
        assert torch.equal(output(model), before)

    def test_the_name_of_a_failed_adapter_is_free(self):
        model = together(("x",))
        with pytest.raises(ValueError, match="not_there"):
            model.add_adapter("w", RandLoraConfig(r=3, target_modules=["not_there"]))
        model.add_adapter("w", RandLoraConfig(r=3, target_modules=["tall"]))
        model.set_adapter("w")
        assert output(model).isfinite().all()

    def test_what_trains_stays_as_it_was(self):
        model = together(("x",))
        model.base_model.model.bad = nn.Bilinear(2, 2, 2).requires_grad_(False)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(UnsupportedLayerError):
            model.add_adapter("w", RandLoraConfig(r=3, target_modules=["tall", "bad"]))
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
        assert "w" not in model.base_model.model.tall.randlora_lambda
        assert "w" not in model.base_model.model.tall.r


class TestMetaDevice:
    def test_low_cpu_mem_usage(self):
        config = RandLoraConfig(r=4, target_modules=STACK_TARGETS)
        model = get_peft_model(stack(), config, low_cpu_mem_usage=True)
        parameters = {name: p for name, p in model.named_parameters() if "randlora_" in name}
        assert all(p.is_meta for p in parameters.values())
        assert not model.base_model.model.tall.get_base_layer().weight.is_meta
        assert model.base_model.model.tall.randlora_A["default"].device.type == "cpu"

    def test_a_model_on_the_meta_device(self):
        with torch.device("meta"):
            base = Stack()
        model = get_peft_model(base, RandLoraConfig(r=4, target_modules=STACK_TARGETS))
        assert all(p.is_meta for p in model.parameters())
        assert model(torch.empty(6, 10, device="meta")).shape == (6, 3)
        assert model.get_nb_trainable_parameters()[0] == 3 * 14 + 3 * 13 + 3 * 13

    def test_filled_afterwards_it_computes_what_it_should(self):
        reference = randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS)))
        with torch.device("meta"):
            base = Stack()
        model = get_peft_model(base, RandLoraConfig(r=4, target_modules=STACK_TARGETS))
        model.load_state_dict(reference.state_dict(), assign=True)
        assert torch.equal(output(model), output(reference))


def test_define_bases_follows_the_largest_output_and_input():
    model = ours(stack(), r=4, target_modules=STACK_TARGETS)
    layers = list(layers_of(model).values())
    (spec,) = define_bases(layers, model.peft_config["default"], "default").values()
    assert (spec.min_dim, spec.max_dim) == (17, 17)
    assert (spec.used_min_dim, spec.used_max_dim) == (10, 17)
    assert layers[0].bases["default"] is get_basis(spec)


def test_moving_the_model_moves_the_adapter_and_not_the_bases():
    model = randomise(ours(stack(), r=4, target_modules=STACK_TARGETS))
    basis = model.model.tall.bases["default"]
    model.double()
    assert model.model.tall.bases["default"] is basis
    assert model.model.tall.randlora_lambda["default"].dtype == torch.float64
    assert output(model, torch.float64).dtype == torch.float64
    assert basis.projections()[0].dtype == torch.bfloat16


def test_bases_of_a_freed_model_are_freed():
    import gc
    import weakref

    model = ours(stack(), r=4, target_modules=STACK_TARGETS, projection_prng_key=4711)
    basis = weakref.ref(model.model.tall.bases["default"])
    model(features())
    del model
    gc.collect()
    assert basis() is None
