"""Adapters of one model that differ in everything; ``reliability/test_state.py`` has random sequences of them."""

import gc
import itertools
import tempfile
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from randlora import RandLoraConfig, get_peft_model
from randlora.ops.bases import basis as bases

from .helpers import STACK_TARGETS, adapted, layers_of, output, randomise, stack

ADAPTERS = {
    "u": {"r": 4, "randlora_alpha": 8, "target_modules": STACK_TARGETS},
    "v": {"r": 7, "randlora_alpha": 3, "target_modules": ["tall"], "projection_prng_key": 5, "sparse": True},
    "w": {
        "r": 2,
        "target_modules": ["tall", "wide"],
        "save_projection": False,
        "sparsity": 2.5,
        "randlora_dropout": 0.3,
    },
    "x": {"r": 4, "randlora_alpha": 2, "target_modules": STACK_TARGETS, "save_projection": False},  # the bases of u
    "y": {"r": 3, "target_modules": ["square", "head"], "very_sparse": True, "randlora_scaling": "paper"},
    "s": {"r": 4, "randlora_alpha": 3, "target_modules": STACK_TARGETS, "structured": True, "groups": 2},
    "z": {"r": 5, "target_modules": ["tall", "head"], "rank_pattern": {"head": 2}, "alpha_pattern": {"tall": 7}},
}


def alone(name):
    return adapted(name=name, seed=ord(name), **ADAPTERS[name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each adapter in a folder."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ADAPTERS:
        alone(name).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", list(itertools.permutations("uvs")), ids="".join)
def test_loaded_in_any_order(saved, order):
    model = PeftModel.from_pretrained(stack(), saved / order[0], adapter_name=order[0])
    for name in order[1:]:
        model.load_adapter(saved / name, name)
    for name in "uvsuv":
        model.set_adapter(name)
        assert torch.equal(output(model), output(alone(name))), name


def test_loading_into_an_adapter_that_is_there_replaces_it(saved):
    model = PeftModel.from_pretrained(stack(), saved / "u", adapter_name="u")
    before = output(model)
    randomise(model, "u", seed=99)
    assert not torch.equal(output(model), before)
    model.load_adapter(saved / "u", "u")
    assert torch.equal(output(model), before)


def test_another_key_or_density_means_other_bases():
    model = alone("u")
    changes = {"key": {"projection_prng_key": 1}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}
    for name, change in changes.items():
        model.add_adapter(name, RandLoraConfig(**ADAPTERS["u"], **change))
    for layer in layers_of(model).values():
        assert len({layer.bases[name].fingerprint for name in ("u", *changes)}) == 4
        zeros = [float((layer.randlora_B[name] == 0).float().mean()) for name in ("u", *changes)]
        assert zeros[0] == zeros[1] == 0
        assert 0.5 < zeros[2] < zeros[3]


def test_dropout_of_one_adapter_leaves_the_others():
    model = alone("w").train()
    model.add_adapter("v", RandLoraConfig(**ADAPTERS["v"]))
    randomise(model, "v", seed=ord("v"))
    model.set_adapter("v")
    assert torch.equal(output(model.train()), output(alone("v")))
    model.set_adapter("w")
    assert not torch.equal(output(model), output(model))


def test_deleting_the_active_adapter_leaves_all_layers_with_the_same_one():
    """Each layer would choose the first of its own adapters: here v in one layer and w in another."""
    model = alone("u")
    for name in "vwx":
        model.add_adapter(name, RandLoraConfig(**ADAPTERS[name]))
        randomise(model, name, seed=ord(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("u")
    assert model.active_adapters == ["v"]
    assert all(layer.active_adapters == ["v"] for layer in layers_of(model).values())
    assert torch.equal(output(model), output(alone("v")))
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"v"}


def test_deleting_the_only_adapter_leaves_the_base_model():
    model = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=["tall"], modules_to_save=["head"]))
    randomise(model)
    model.delete_adapter("default")
    assert not model.peft_config
    assert torch.equal(output(model.base_model.model), output(stack()))


def test_deleting_an_inactive_adapter_changes_nothing_else():
    model = alone("u")
    model.add_adapter("v", RandLoraConfig(**ADAPTERS["v"]))
    model.set_adapter("u", inference_mode=True)
    before = output(model)
    model.delete_adapter("v")
    assert torch.equal(output(model), before)
    assert not any(p.requires_grad for p in model.parameters())


def test_deleting_an_adapter_with_a_module_while_several_others_are_active():
    """PEFT fails half-way, when the updates and the config are gone."""
    model = alone("u")
    model.add_adapter("v", RandLoraConfig(**ADAPTERS["v"]))
    model.add_adapter("heads", RandLoraConfig(r=3, target_modules=["tall"], modules_to_save=["head"]))
    model.base_model.set_adapter(["u", "v"])
    before = output(model)
    model.delete_adapter("heads")
    assert torch.equal(output(model), before)
    assert not [name for name, _ in model.named_parameters() if "heads" in name]
    assert model.active_adapters == ["u", "v"]


class TestBases:
    def test_the_same_numbers_are_shared_however_they_came(self, saved):
        """Drawn, loaded with the file, and loaded without."""
        model = alone("u")
        model.load_adapter(saved / "u", "loaded")
        model.load_adapter(saved / "x", "drawn")
        other = PeftModel.from_pretrained(stack(), saved / "u")
        for layer in layers_of(model).values():
            assert len({id(basis) for basis in layer.bases.values()}) == 1
        assert other.base_model.model.tall.bases["default"] is model.base_model.model.tall.bases["u"]

    @pytest.mark.parametrize("order", list(itertools.permutations("uvx")), ids="".join)
    def test_they_are_freed_with_the_last_adapter_that_uses_them(self, order):
        key = {"projection_prng_key": 4711}  # no other test holds these
        names = "uvx"
        model = get_peft_model(stack(), RandLoraConfig(**ADAPTERS["u"] | key), adapter_name="u")
        for name in "vx":
            model.add_adapter(name, RandLoraConfig(**ADAPTERS[name] | key))
        output(model)
        held = {name: weakref.ref(model.base_model.model.tall.bases[name]) for name in names}
        assert held["u"]() is held["x"]()
        assert held["u"]() is not held["v"]()
        left = set(names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in order:
                model.delete_adapter(name)
                left.remove(name)
                gc.collect()
                assert (held["v"]() is None) == ("v" not in left)
                assert (held["u"]() is None) == (not left & {"u", "x"})

    def test_two_models_share_them(self):
        key = {"projection_prng_key": 4712}
        first, second = (get_peft_model(stack(), RandLoraConfig(**ADAPTERS["u"] | key)) for _ in range(2))
        held = weakref.ref(first.base_model.model.tall.bases["default"])
        assert second.base_model.model.tall.bases["default"] is held()
        del first
        gc.collect()
        assert held() is not None
        del second
        gc.collect()
        assert held() is None
        assert not [spec for spec in bases._live if getattr(spec, "key", None) == 4712]


def test_save_projection_is_each_adapters_own():
    model = alone("u")
    model.add_adapter("x", RandLoraConfig(**ADAPTERS["x"]))
    with tempfile.TemporaryDirectory() as target:
        model.save_pretrained(target)
        sizes = {name: (Path(target) / name / "adapter_model.safetensors").stat().st_size for name in "ux"}
    assert sizes["u"] > sizes["x"] + 2 * 17 * 3 * 4  # B alone, in bfloat16
