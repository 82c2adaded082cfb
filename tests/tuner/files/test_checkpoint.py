"""Adapter files: small, exact, readable by PEFT and from PEFT, and refused where they do not fit."""

import json
import math
import os
import warnings

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.randlora import RandLoraConfig as TheirConfig
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file

from randlora import BasisMismatchError, CheckpointError, PeftModel, RandLoraConfig, get_peft_model
from randlora.ops.bases import basis_from_projections

from ..helpers import (
    LLAMA_TARGETS,
    STACK_TARGETS,
    Stack,
    assert_close,
    assert_same_tensors,
    conv_stack,
    features,
    gpt2,
    layers_of,
    llama,
    output,
    peft_itself,
    randomise,
    saved,
    snapshot,
    stack,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}
CUT = STACK_TARGETS  # a tall and a wide layer: PEFT draws 17×17, no layer reads all of it
WHOLE = ["tall", "square"]  # the largest layer reads all


def saved_by_peft(folder, build=stack, change=None, **config):
    """One that PEFT's own classes wrote, and its model's output."""
    with peft_itself(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(), TheirConfig(**{"r": 4, "randlora_alpha": 8, **config}))
        if change:
            change(model)
        randomise(model).eval().save_pretrained(folder)
        return output(model).detach()


def load(folder, build=stack, **options):
    return PeftModel.from_pretrained(build(), folder, **options).eval()


def output_in_peft(folder, build=stack):
    with peft_itself(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(build(), folder).eval()
        assert type(model.peft_config["default"]) is TheirConfig
        return output(model).detach()


def edit(folder, change):
    """Rewrites the weights file."""
    content = load_file(folder / WEIGHTS)
    changed = change(content)
    save_file(content if changed is None else changed, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder, **changes):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | changes))


def basis_keys(folder):
    return sorted(key for key in load_file(folder / WEIGHTS) if "randlora_A" in key or "randlora_B" in key)


class TestSize:
    """The Llama shape of the design, for which PEFT writes 934 MB."""

    @pytest.fixture(scope="class")
    def model(self):
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
        with torch.device("meta"):
            base = llama(**sizes, **heads)
        base = base.to_empty(device="cpu")
        return get_peft_model(base, RandLoraConfig(r=32, target_modules=LLAMA_TARGETS))

    @pytest.mark.parametrize(("save_projection", "limit"), [(True, 10e6), (False, 4e6)])
    def test_of_the_file(self, model, tmp_path, save_projection, limit):
        model.peft_config["default"].save_projection = save_projection
        model.save_pretrained(tmp_path)
        assert (tmp_path / WEIGHTS).stat().st_size <= limit
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit

    def test_lambda_and_gamma_are_all_there_in_float32(self, model, tmp_path):
        model.peft_config["default"].save_projection = False
        model.save_pretrained(tmp_path)
        content = load_file(tmp_path / WEIGHTS)
        assert len(content) == 2 * 7 * 4
        assert {tensor.dtype for tensor in content.values()} == {torch.float32}
        assert sum(tensor.numel() for tensor in content.values()) == 4 * 7 * 32 * (32 + 1024)


class TestContent:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("targets", [CUT, WHOLE], ids=["cut", "whole"])
    def test_names_and_dtypes(self, tmp_path, kind, targets):
        saved(tmp_path, target_modules=targets, **KINDS[kind])
        content = load_file(tmp_path / WEIGHTS)
        suffix = "_used" if targets is CUT else ""
        names = {f"base_model.randlora_{x}{suffix}" for x in "AB"}
        names |= {f"base_model.model.{name}.randlora_{x}" for name in targets for x in ("lambda", "gamma")}
        assert set(content) == names
        dtype = torch.bfloat16 if kind == "dense" else torch.float32
        for name, tensor in content.items():
            assert tensor.dtype == (torch.float32 if "lambda" in name or "gamma" in name else dtype)
        assert content[f"base_model.randlora_A{suffix}"].ndim == 3

    def test_without_projections_there_are_none(self, tmp_path):
        saved(tmp_path, target_modules=CUT, save_projection=False)
        assert basis_keys(tmp_path) == []

    def test_the_config_records_the_fingerprint(self, tmp_path):
        model = saved(tmp_path, target_modules=CUT)
        expected = model.base_model.model.tall.bases["default"].fingerprint
        assert json.loads((tmp_path / CONFIG).read_text())["basis_fingerprint"] == expected

    def test_runtime_choices_are_not_in_the_config(self, tmp_path):
        saved(tmp_path, target_modules=CUT)
        content = json.loads((tmp_path / CONFIG).read_text())
        assert not [name for name in content if "plan" in name or "cache" in name]

    def test_saving_twice_gives_the_same_bytes(self, tmp_path):
        model = saved(tmp_path / "a", target_modules=CUT)
        model.save_pretrained(tmp_path / "b")
        load(tmp_path / "a").save_pretrained(tmp_path / "c")
        contents = {(tmp_path / x / WEIGHTS).read_bytes() for x in "abc"}
        assert len(contents) == 1

    def test_saving_leaves_the_model_as_it_was(self, tmp_path):
        model = randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=CUT)))
        state, before = snapshot(model), output(model)
        model.save_pretrained(tmp_path)
        assert_same_tensors(model.state_dict(), state)
        assert torch.equal(output(model), before)

    def test_a_half_precision_base_saves_float32(self, tmp_path):
        config = RandLoraConfig(r=4, target_modules=CUT)
        randomise(get_peft_model(stack().bfloat16(), config)).save_pretrained(tmp_path)
        content = load_file(tmp_path / WEIGHTS)
        assert {tensor.dtype for name, tensor in content.items() if "lambda" in name or "gamma" in name} == {
            torch.float32
        }


class TestRoundTrip:
    @pytest.mark.parametrize("kind", [*KINDS.values(), {"sparsity": 4.5}], ids=str)
    @pytest.mark.parametrize("targets", [CUT, WHOLE], ids=["cut", "whole"])
    @pytest.mark.parametrize("save_projection", [True, False])
    @pytest.mark.parametrize("key", [0, -7, 2**40 + 3])
    def test_bit_identical(self, tmp_path, kind, targets, save_projection, key):
        config = {"target_modules": targets, "save_projection": save_projection, "projection_prng_key": key}
        model = saved(tmp_path, **config, **kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load(tmp_path)
        assert_same_tensors(loaded.state_dict(), model.state_dict())
        assert torch.equal(output(loaded), output(model))
        basis = model.base_model.model.tall.bases["default"]
        assert loaded.base_model.model.tall.bases["default"].fingerprint == basis.fingerprint

    @pytest.mark.parametrize(
        ("build", "targets"), [(conv_stack, CUT), (llama, LLAMA_TARGETS), (gpt2, ["c_attn", "c_proj", "c_fc"])]
    )
    def test_of_other_models(self, tmp_path, build, targets):
        model = saved(tmp_path, build, target_modules=targets)
        assert torch.equal(output(load(tmp_path, build)), output(model))

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_low_cpu_mem_usage(self, tmp_path, low_cpu_mem_usage):
        model = saved(tmp_path, target_modules=CUT)
        loaded = load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        assert torch.equal(output(loaded), output(model))

    @pytest.mark.parametrize("bias", ["all", "randlora_only"])
    def test_trained_biases(self, tmp_path, bias):
        model = randomise(get_peft_model(stack(), RandLoraConfig(r=4, bias=bias, target_modules=["tall", "wide"])))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "bias" in name:
                parameter.data.normal_()
        model.save_pretrained(tmp_path)
        found = [key for key in load_file(tmp_path / WEIGHTS) if "bias" in key]
        assert len(found) == {"all": 4, "randlora_only": 2}[bias]
        assert torch.equal(output(load(tmp_path)), output(model))

    def test_modules_to_save(self, tmp_path):
        config = RandLoraConfig(r=4, target_modules=CUT, modules_to_save=["head"])
        model = randomise(get_peft_model(stack(), config))
        model.base_model.model.head.modules_to_save["default"].weight.data.normal_()
        model.save_pretrained(tmp_path)
        assert torch.equal(output(load(tmp_path)), output(model))

    @pytest.mark.parametrize("save_projection", [True, False])
    @pytest.mark.parametrize("patterns", [{"tall": 2}, {"tall": 2, "wide": 3, "square": 5}], ids=["one", "all"])
    def test_rank_and_alpha_patterns(self, tmp_path, save_projection, patterns):
        config = {"rank_pattern": patterns, "alpha_pattern": {"wide": 17}, "save_projection": save_projection}
        model = saved(tmp_path, target_modules=CUT, **config)
        loaded = load(tmp_path)
        assert {name: layer.r["default"] for name, layer in layers_of(loaded).items()} == {
            name: layer.r["default"] for name, layer in layers_of(model).items()
        }
        assert loaded.base_model.model.wide.scaling == model.base_model.model.wide.scaling
        assert torch.equal(output(loaded), output(model))

    def test_several_adapters(self, tmp_path):
        model = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=CUT))
        model.add_adapter("other", RandLoraConfig(r=3, target_modules=["wide"], sparse=True, projection_prng_key=4))
        randomise(model)
        randomise(model, "other", seed=9)
        model.save_pretrained(tmp_path)
        first = output(model)
        model.set_adapter("other")
        second = output(model)
        loaded = load(tmp_path)
        loaded.load_adapter(tmp_path / "other", "under_another_name")
        assert torch.equal(output(loaded), first)
        loaded.set_adapter("under_another_name")
        assert torch.equal(output(loaded), second)

    def test_a_loaded_adapter_trains_on(self, tmp_path):
        saved(tmp_path, target_modules=CUT)
        loaded = load(tmp_path, is_trainable=True)
        output(loaded).sum().backward()
        assert len([p for p in loaded.parameters() if p.grad is not None]) == 6
        assert not [p for p in load(tmp_path).parameters() if p.requires_grad]

    def test_a_pickle_is_refused_and_can_be_rewritten(self, tmp_path):
        model = saved(tmp_path, target_modules=CUT)
        os.remove(tmp_path / WEIGHTS)
        model.save_pretrained(tmp_path, safe_serialization=False)
        with pytest.raises(CheckpointError, match=r"is a pickle.*save_file\(torch\.load"):
            load(tmp_path)
        with pytest.raises(CheckpointError, match="is a pickle"):
            load_peft_weights(tmp_path)
        save_file(torch.load(tmp_path / "adapter_model.bin", weights_only=True), tmp_path / WEIGHTS)
        assert torch.equal(output(load(tmp_path)), output(model))

    def test_state_dict_in_memory(self):
        config = RandLoraConfig(r=4, target_modules=CUT)
        model = randomise(get_peft_model(stack(), config))
        other = get_peft_model(stack(), config)
        result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
        assert not result.unexpected_keys
        assert torch.equal(output(other), output(model))

    def test_a_whole_models_state_dict(self):
        config = RandLoraConfig(r=4, target_modules=CUT)
        model, other = randomise(get_peft_model(stack(), config)), get_peft_model(Stack(), config)
        other.load_state_dict(model.state_dict())
        assert torch.equal(output(other), output(model))


class TestFromPeft:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("build", "targets"),
        [(stack, CUT), (stack, WHOLE), (conv_stack, CUT), (llama, LLAMA_TARGETS)],
        ids=["cut", "whole", "conv1d", "llama"],
    )
    @pytest.mark.parametrize("save_projection", [True, False])
    def test_same_outputs(self, tmp_path, kind, build, targets, save_projection):
        expected = saved_by_peft(
            tmp_path, build, target_modules=targets, save_projection=save_projection, **KINDS[kind]
        )
        repeated = [key for key in basis_keys(tmp_path) if ".model." in key]
        assert bool(repeated) == save_projection  # PEFT repeats the bases for each layer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load(tmp_path, build)
        assert_close(output(loaded).detach(), expected, 1e-5)

    def test_saved_again_it_is_small_and_the_same(self, tmp_path):
        expected = saved_by_peft(tmp_path / "peft", llama, target_modules=LLAMA_TARGETS)
        load(tmp_path / "peft", llama).save_pretrained(tmp_path / "ours")
        sizes = [(tmp_path / who / WEIGHTS).stat().st_size for who in ("peft", "ours")]
        assert sizes[1] < sizes[0] / 2
        assert len(basis_keys(tmp_path / "ours")) == 2
        assert_close(output(load(tmp_path / "ours", llama)).detach(), expected, 1e-5)

    @staticmethod
    def other_bases(model):
        """As a machine draws them that does not support bfloat16."""
        for buffers in (model.base_model.randlora_A, model.base_model.randlora_B):
            buffers["default"].copy_(torch.randn(buffers["default"].shape))

    @pytest.mark.parametrize("targets", [CUT, WHOLE], ids=["cut", "whole"])
    def test_bases_that_we_would_not_draw_are_taken_from_the_file(self, tmp_path, targets):
        expected = saved_by_peft(tmp_path / "peft", change=self.other_bases, target_modules=targets)
        loaded = load(tmp_path / "peft")
        assert_close(output(loaded).detach(), expected, 1e-5)
        loaded.save_pretrained(tmp_path / "ours")
        again = load(tmp_path / "ours")
        assert torch.equal(output(again), output(loaded))
        assert_close(output_in_peft(tmp_path / "ours"), expected, 1e-5)

    def test_such_bases_without_projections_are_refused_later(self, tmp_path):
        saved_by_peft(tmp_path / "peft", change=self.other_bases, target_modules=CUT)
        loaded = load(tmp_path / "peft")
        loaded.peft_config["default"].save_projection = False
        loaded.save_pretrained(tmp_path / "ours")
        with pytest.raises(BasisMismatchError):
            load(tmp_path / "ours")

    def test_neither_fingerprint_nor_projections_warns(self, tmp_path):
        expected = saved_by_peft(tmp_path, target_modules=CUT, projection_prng_key=3, save_projection=False)
        with pytest.warns(UserWarning, match="projection_prng_key=3"):
            loaded = load(tmp_path)
        assert_close(output(loaded).detach(), expected, 1e-5)

    def test_weights_loaded_into_an_adapter_that_was_made_here_are_not_doubted(self, tmp_path):
        """As the Trainer does when it resumes."""
        config = {"target_modules": CUT, "save_projection": False}
        trained = saved(tmp_path, **config)
        model = get_peft_model(stack(), RandLoraConfig(r=4, randlora_alpha=8, **config)).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.load_adapter(str(tmp_path), "default", is_trainable=True)
        assert torch.equal(output(model), output(trained))

    def test_copies_that_differ_between_layers_are_refused(self, tmp_path):
        saved_by_peft(tmp_path, target_modules=CUT)
        key = next(key for key in basis_keys(tmp_path) if "wide.randlora_B" in key)

        def change(content):
            content[key][0, 0, 0] += 1

        edit(tmp_path, change)
        with pytest.raises(CheckpointError, match="different bases for different layers"):
            load(tmp_path)


class TestToPeft:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("targets", [CUT, WHOLE], ids=["cut", "whole"])
    @pytest.mark.parametrize("save_projection", [True, False])
    def test_same_outputs(self, tmp_path, kind, targets, save_projection):
        model = saved(tmp_path, target_modules=targets, save_projection=save_projection, **KINDS[kind])
        assert_close(output_in_peft(tmp_path), output(model).detach(), 1e-5)

    @pytest.mark.parametrize(
        ("build", "targets"), [(conv_stack, CUT), (llama, LLAMA_TARGETS), (gpt2, ["c_attn", "c_proj", "c_fc"])]
    )
    def test_of_other_models(self, tmp_path, build, targets):
        model = saved(tmp_path, build, target_modules=targets)
        assert_close(output_in_peft(tmp_path, build), output(model).detach(), 1e-5)

    @pytest.mark.parametrize("targets", [CUT, WHOLE], ids=["cut", "whole"])
    def test_a_density_that_peft_cannot_draw_comes_with_whole_bases(self, tmp_path, targets):
        model = saved(tmp_path, target_modules=targets, sparsity=4.5)
        assert basis_keys(tmp_path) == ["base_model.randlora_A", "base_model.randlora_B"]
        assert_close(output_in_peft(tmp_path), output(model).detach(), 1e-5)

    @pytest.mark.parametrize("save_projection", [True, False])
    def test_paper_scaling_is_folded_into_gamma(self, tmp_path, save_projection):
        config = {"randlora_scaling": "paper", "randlora_alpha": 8, "save_projection": save_projection}
        model = saved(tmp_path, target_modules=CUT, **config)
        assert_close(output_in_peft(tmp_path), output(model).detach(), 1e-5)
        content = load_file(tmp_path / WEIGHTS)
        layer = model.base_model.model.tall
        gamma = layer.randlora_gamma["default"].detach()
        expected = gamma / math.sqrt(gamma.shape[0])
        torch.testing.assert_close(content["base_model.model.tall.randlora_gamma"], expected, rtol=1e-6, atol=0)
        lam = layer.randlora_lambda["default"].detach()
        assert torch.equal(content["base_model.model.tall.randlora_lambda"], lam)

    def test_paper_scaling_round_trip_is_within_one_rounding(self, tmp_path):
        model = saved(tmp_path, target_modules=CUT, randlora_scaling="paper")
        loaded = load(tmp_path)
        for name, layer in layers_of(model).items():
            mine, theirs = layer.randlora_gamma["default"], layers_of(loaded)[name].randlora_gamma["default"]
            ulp = torch.nextafter(mine.abs(), torch.tensor(math.inf)) - mine.abs()
            assert ((mine - theirs).abs() <= ulp).all()
            assert torch.equal(layer.randlora_lambda["default"], layers_of(loaded)[name].randlora_lambda["default"])
            assert layers_of(loaded)[name].scaling == layer.scaling
        assert_close(output(loaded).detach(), output(model).detach(), 1e-6)

    def test_paper_scaling_does_not_drift_over_many_round_trips(self, tmp_path):
        model = saved(tmp_path, target_modules=CUT, randlora_scaling="paper")
        loaded = load(tmp_path)
        for _ in range(20):
            loaded.save_pretrained(tmp_path)
            loaded = load(tmp_path)
        for name, layer in layers_of(model).items():
            found = layers_of(loaded)[name].randlora_gamma["default"]
            torch.testing.assert_close(found, layer.randlora_gamma["default"], rtol=5e-7, atol=0)


class TestRefused:
    @pytest.mark.parametrize("targets", [CUT, WHOLE], ids=["cut", "whole"])
    @pytest.mark.parametrize("which", ["A", "B"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_damaged_value(self, tmp_path, targets, which, kind):
        saved(tmp_path, target_modules=targets, **KINDS[kind])
        key = next(key for key in basis_keys(tmp_path) if f"randlora_{which}" in key)

        def change(content):
            content[key].view(-1)[-1] += 1

        edit(tmp_path, change)
        with pytest.raises(BasisMismatchError, match="fingerprint"):
            load(tmp_path)

    def test_a_truncated_file(self, tmp_path):
        saved(tmp_path, target_modules=CUT)
        content = (tmp_path / WEIGHTS).read_bytes()
        (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
        with pytest.raises(Exception, match=r"(?i)header|incomplete|safetensor|deserializ"):
            load(tmp_path)

    def test_bases_of_another_adapter(self, tmp_path):
        saved(tmp_path / "one", target_modules=CUT)
        saved(tmp_path / "two", target_modules=CUT, projection_prng_key=9)
        foreign = load_file(tmp_path / "two" / WEIGHTS)
        edit(tmp_path / "one", lambda content: content | {key: foreign[key] for key in basis_keys(tmp_path / "two")})
        with pytest.raises(BasisMismatchError, match="fingerprint"):
            load(tmp_path / "one")

    @pytest.mark.parametrize("change", [{"projection_prng_key": 1}, {"sparse": True}, {"sparsity": 2.0}], ids=str)
    def test_a_changed_config_without_projections(self, tmp_path, change):
        saved(tmp_path, target_modules=CUT, save_projection=False)
        edit_config(tmp_path, **change)
        with pytest.raises(BasisMismatchError, match="fingerprint"):
            load(tmp_path)

    @pytest.mark.parametrize("change", [{"projection_prng_key": 1}, {"sparse": True}], ids=str)
    def test_a_changed_config_with_projections_computes_with_the_file(self, tmp_path, change):
        model = saved(tmp_path, target_modules=CUT)
        edit_config(tmp_path, **change)
        assert torch.equal(output(load(tmp_path)), output(model))

    def test_a_changed_config_whose_file_lost_its_projections(self, tmp_path):
        saved(tmp_path, target_modules=CUT)
        edit_config(tmp_path, projection_prng_key=1)
        edit(tmp_path, lambda content: {k: v for k, v in content.items() if "_used" not in k})
        with pytest.raises(BasisMismatchError):
            load(tmp_path)

    @pytest.mark.parametrize("change", [{"r": 3}, {"r": 5}], ids=str)
    @pytest.mark.parametrize("save_projection", [True, False])
    def test_a_changed_rank(self, tmp_path, change, save_projection):
        saved(tmp_path, target_modules=CUT, save_projection=save_projection)
        edit_config(tmp_path, **change)
        with pytest.raises((BasisMismatchError, CheckpointError, RuntimeError)):
            load(tmp_path)

    @pytest.mark.parametrize("save_projection", [True, False])
    @pytest.mark.parametrize("hidden", [24, 8])
    def test_a_model_of_another_size(self, tmp_path, save_projection, hidden):
        saved(tmp_path, llama, target_modules=["q_proj"], save_projection=save_projection)
        with pytest.raises((BasisMismatchError, CheckpointError, RuntimeError)):
            load(tmp_path, lambda: llama(hidden_size=hidden))

    @pytest.mark.parametrize("which", ["A", "B"])
    @pytest.mark.parametrize("targets", [CUT, WHOLE], ids=["cut", "whole"])
    def test_half_of_the_bases(self, tmp_path, which, targets):
        saved(tmp_path, target_modules=targets)
        missing = next(key for key in basis_keys(tmp_path) if f"randlora_{which}" in key)
        edit(tmp_path, lambda content: {key: value for key, value in content.items() if key != missing})
        with pytest.raises(CheckpointError, match=f"only randlora_{'B' if which == 'A' else 'A'}"):
            load(tmp_path)

    @pytest.mark.parametrize(
        "change",
        [lambda t: t.flatten(1), lambda t: t[:2].contiguous(), lambda t: t[..., :3].contiguous()],
        ids=["2d", "short", "narrow"],
    )
    @pytest.mark.parametrize("which", ["A", "B"])
    @pytest.mark.parametrize("fingerprint", [True, False])
    def test_bases_of_wrong_shapes(self, tmp_path, change, which, fingerprint):
        saved(tmp_path, target_modules=WHOLE)
        if not fingerprint:
            edit_config(tmp_path, basis_fingerprint=None)
        key = f"base_model.randlora_{which}"
        edit(tmp_path, lambda content: content | {key: change(content[key])})
        with pytest.raises((BasisMismatchError, CheckpointError)):
            load(tmp_path)

    def test_no_layer_uses_the_bases(self):
        model = get_peft_model(stack(), RandLoraConfig(r=4, target_modules=["tall"], rank_pattern={"tall": 2}))
        state = get_peft_model_state_dict(model)
        state["base_model.randlora_A"], state["base_model.randlora_B"] = torch.randn(4, 1, 10), torch.randn(17, 3, 4)
        with pytest.raises(CheckpointError, match="no layer"):
            set_peft_model_state_dict(model, state)

    @pytest.mark.parametrize("save_projection", [True, False])
    def test_a_refused_adapter_leaves_the_first_as_it_was(self, tmp_path, save_projection):
        saved(tmp_path, target_modules=CUT, projection_prng_key=5, save_projection=save_projection)
        edit_config(tmp_path, basis_fingerprint="0" * 64)
        model = randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=["tall"])))
        before = output(model)
        with pytest.raises(BasisMismatchError):
            model.load_adapter(tmp_path, "second")
        assert torch.equal(output(model), before)

    def test_a_config_with_a_fingerprint_starts_no_other_adapter(self):
        config = RandLoraConfig(r=4, target_modules=CUT, save_projection=False, basis_fingerprint="0" * 64)
        model = stack()
        with pytest.raises(BasisMismatchError, match="basis_fingerprint=None"):
            get_peft_model(model, config)
        assert not layers_of(model)
        assert torch.equal(output(model), output(stack()))

    def test_bases_that_must_come_from_a_file_are_not_replaced_by_others(self):
        config = RandLoraConfig(r=4, target_modules=CUT, basis_fingerprint="0" * 64)
        model = get_peft_model(stack(), config)
        with pytest.raises(BasisMismatchError, match="0" * 64):
            model(features())


def test_bases_from_a_file_are_shared_by_all_layers_and_adapters(tmp_path):
    saved_by_peft(tmp_path, change=TestFromPeft.other_bases, target_modules=CUT)
    model = load(tmp_path)
    model.load_adapter(tmp_path, "again")
    found = {id(basis) for layer in layers_of(model).values() for basis in layer.bases.values()}
    assert len(found) == 1
    basis = model.base_model.model.tall.bases["default"]
    assert basis is basis_from_projections(*basis.projections())
