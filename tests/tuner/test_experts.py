"""Experts and routers that names of Transformers 4 mean: what PEFT's LoRA adapts, and nothing left out silently."""

import json
import warnings

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from randlora import CheckpointError, ConfigError, PeftModel, RandLoraConfig, UnsupportedLayerError, get_peft_model
from randlora.analysis.budget import Budget, Setup, plan_training
from randlora.tuner.files.adapter_folder import read_adapter
from randlora.tuner.layers.base import RandLoraLayer
from randlora.tuner.shapes import known_shapes

from .helpers import LLAMA_TARGETS, TheirConfig, TheirModel, assert_close, llama, randomise, tokens

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = {"q_lora_rank": 6, "kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
STACKS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def tiny(model, config, **sizes):
    torch.manual_seed(1)
    return model(config(**{**SIZES, **HEADS, **sizes})).eval()


def qwen3(**sizes):
    return tiny(Qwen3MoeForCausalLM, Qwen3MoeConfig, head_dim=8, **{**EXPERTS, **sizes})


def qwen2():
    return tiny(Qwen2MoeForCausalLM, Qwen2MoeConfig, shared_expert_intermediate_size=12, **EXPERTS)


def mixtral():
    return tiny(MixtralForCausalLM, MixtralConfig, num_local_experts=4, num_experts_per_tok=2)


def olmoe():
    return tiny(OlmoeForCausalLM, OlmoeConfig, num_experts=4, num_experts_per_tok=2)


def gpt_oss():
    return tiny(GptOssForCausalLM, GptOssConfig, head_dim=8, num_local_experts=4, num_experts_per_tok=2)


def deepseek():
    """One dense layer, one mixture with shared experts."""
    routing = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    return tiny(DeepseekV3ForCausalLM, DeepseekV3Config, moe_intermediate_size=12, **routing, **LATENT)


def weight_of(path, layer):
    """Path in the base model of the weight that ``layer``, of LoRA or RandLoRA, adapts."""
    name = layer.parameter_name if type(layer).__name__ == "ParamWrapper" else "weight"
    return f"{path.replace('.base_layer', '')}.{name}"


def adapted_weights(model, kind=RandLoraLayer):
    layers = model.get_base_model().named_modules()
    return {weight_of(path, layer) for path, layer in layers if isinstance(layer, kind)}


def by_lora(base, targets, **config):
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, **config))
    return adapted_weights(model, LoraLayer)


def adapt(base, targets, **config):
    return get_peft_model(base, RandLoraConfig(r=3, target_modules=targets, **config))


def save_shape(base, folder):
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder)


def expected_paths(*names, layers=(0, 1)):
    return {f"model.layers.{i}.{name}" for i in layers for name in names}


def weights(*modules):
    return [f"{module}.weight" for module in modules]


USUAL = expected_paths(*weights(*ATTENTION), *STACKS)
MIXTRAL = ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"]


@pytest.mark.parametrize(
    ("build", "targets", "expected"),
    [
        (qwen3, LLAMA_TARGETS, USUAL),
        (olmoe, LLAMA_TARGETS, USUAL),
        (mixtral, MIXTRAL, USUAL),
        (qwen3, ["gate_proj", "up_proj", "down_proj"], expected_paths(*STACKS)),
        (mixtral, ["w1", "w2", "w3"], expected_paths(*STACKS)),
        (mixtral, ["w2"], expected_paths(STACKS[0])),
        (qwen3, ["q_proj", "gate"], expected_paths("self_attn.q_proj.weight", "mlp.gate.weight")),
        (qwen3, "all-linear", USUAL | expected_paths("mlp.gate.weight")),
        (mixtral, "all-linear", USUAL | expected_paths("mlp.gate.weight")),
        (mixtral, r".*\.(q_proj|w[123])", expected_paths("self_attn.q_proj.weight", *STACKS)),
        (qwen3, r".*\.(gate|up|down)_proj", expected_paths(*STACKS)),
        (qwen3, r".*\.(v_proj|gate)", expected_paths("self_attn.v_proj.weight", "mlp.gate.weight")),
        (qwen3, ["q_proj", "v_proj"], expected_paths(*weights("self_attn.q_proj", "self_attn.v_proj"))),
        (gpt_oss, ["q_proj"], expected_paths("self_attn.q_proj.weight")),
    ],
)
def test_names_mean_what_they_mean_for_lora(build, targets, expected):
    assert adapted_weights(adapt(build(), targets)) == by_lora(build(), targets) == expected


class TestDenseAndSharedExperts:
    """LoRA leaves out linear layers of the names that it takes for experts; they are named, so they are adapted."""

    SHARED = weights(*(f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")))
    DENSE = weights(*(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")))

    @pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], r".*\.(gate|up|down)_proj"])
    def test_all_that_is_named(self, targets):
        found = adapted_weights(adapt(deepseek(), targets))
        assert found == by_lora(deepseek(), targets) | {*self.SHARED, *self.DENSE}
        assert found - {*self.SHARED, *self.DENSE} == expected_paths(*STACKS, layers=[1])

    def test_all_linear_layers(self):
        found = adapted_weights(adapt(deepseek(), "all-linear"))
        assert found == by_lora(deepseek(), "all-linear") | {*self.SHARED, *self.DENSE}

    def test_a_path_tells_them_apart(self):
        targets = ["shared_experts.gate_proj"]
        assert adapted_weights(adapt(deepseek(), targets)) == {self.SHARED[0]}


class TestRestrictions:
    """They hold for experts as for layers; LoRA's experts pass over them."""

    def test_layers_to_transform(self):
        model = adapt(qwen3(), LLAMA_TARGETS, layers_to_transform=[1])
        assert adapted_weights(model) == {path for path in USUAL if ".1." in path}

    def test_an_expression_of_one_layer(self):
        model = adapt(qwen3(), r".*layers\.0\..*\.(q_proj|gate|gate_proj|up_proj)")
        names = ["self_attn.q_proj.weight", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
        assert adapted_weights(model) == expected_paths(*names, layers=[0])

    @pytest.mark.parametrize("targets", [LLAMA_TARGETS, "all-linear", r".*_proj"])
    def test_exclude_modules(self, targets, recwarn):
        model = adapt(qwen3(), targets, exclude_modules=["experts", "gate"])
        assert adapted_weights(model) == expected_paths(*weights(*ATTENTION))
        model = adapt(qwen3(), targets, exclude_modules=["down_proj", "gate"])
        assert adapted_weights(model) == expected_paths(*weights(*ATTENTION), STACKS[1])
        assert not [str(w.message) for w in recwarn if w.category is not FutureWarning]

    def test_modules_to_save(self):
        model = adapt(qwen3(), [*LLAMA_TARGETS, "gate"], modules_to_save=["gate"])
        assert adapted_weights(model) == USUAL
        trained = [name for name, p in model.named_parameters() if p.requires_grad and ".gate." in name]
        assert [name.endswith("gate.modules_to_save.default.weight") for name in trained] == [True, True]

    def test_a_part_of_a_stack_is_an_error(self):
        with pytest.raises(ConfigError, match=r"names gate_proj of 'model\.layers\.0\.mlp\.experts' without up_proj"):
            adapt(qwen3(), ["q_proj", "gate_proj"])
        with pytest.raises(ValueError, match="without also targeting up_proj"):
            by_lora(qwen3(), ["q_proj", "gate_proj"])

    def test_dropout_is_an_error_with_a_way_out(self):
        with pytest.raises(ConfigError, match=r"set it to 0, or leave the experts out with `exclude_modules"):
            adapt(qwen3(), LLAMA_TARGETS, randlora_dropout=0.1)
        model = adapt(qwen3(), LLAMA_TARGETS, randlora_dropout=0.1, exclude_modules=["experts"])
        assert adapted_weights(model) == expected_paths(*weights(*ATTENTION))

    def test_patterns_reach_stacks(self):
        model = adapt(
            qwen3(), LLAMA_TARGETS, rank_pattern={"down_proj": 2}, alpha_pattern={"experts.gate_up_proj": 7.0}
        )
        experts = model.base_model.model.model.layers[0].mlp.experts
        found = {layer.parameter_name: layer for layer in (experts, experts.base_layer)}
        assert {name: layer.r["default"] for name, layer in found.items()} == {"down_proj": 2, "gate_up_proj": 3}
        assert found["gate_up_proj"].scaling["default"] == 7 / 3


def test_updates_of_experts_and_routers_are_what_is_computed():
    model = randomise(adapt(mixtral(), [*MIXTRAL, "gate"]))
    plain = mixtral()
    updated = 0
    with torch.no_grad():
        for path, layer in model.get_base_model().named_modules():
            if isinstance(layer, RandLoraLayer):
                weight = plain.get_parameter(weight_of(path, layer))
                weight += layer.get_delta_weight("default")
                updated += 1
    assert updated == 2 * (4 + 2 + 1)
    expected = plain(input_ids=tokens()).logits
    assert_close(model(input_ids=tokens()).logits.detach(), expected.detach(), 1e-5)
    assert not torch.allclose(expected, mixtral()(input_ids=tokens()).logits, atol=1e-2)


@pytest.mark.parametrize(("build", "targets"), [(qwen3, LLAMA_TARGETS), (mixtral, [*MIXTRAL, "gate"])])
class TestFiles:
    def test_a_file_names_what_was_adapted_and_loads_quietly(self, build, targets, tmp_path):
        model = randomise(adapt(build(), targets))
        model.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "adapter_config.json").read_text())
        assert content["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
        assert content["target_parameters"] == ["down_proj", *["gate.weight"][: "gate" in targets], "gate_up_proj"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=FutureWarning)
            again = PeftModel.from_pretrained(build(), tmp_path)
        assert adapted_weights(again) == adapted_weights(model)
        expected = model(input_ids=tokens()).logits.detach()
        assert torch.equal(again.eval()(input_ids=tokens()).logits, expected)
        native = build()
        native.load_adapter(str(tmp_path))
        assert torch.equal(native.eval()(input_ids=tokens()).logits, expected)

    def test_plan_and_inspect_agree_with_the_model(self, build, targets, tmp_path):
        base = build()
        save_shape(base, tmp_path / "base")
        model = adapt(base, targets)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        plan = plan_training(Setup(model=str(tmp_path / "base"), targets=targets, length=8, batch_size=1), Budget(r=3))
        assert plan.chosen.trainable == trainable
        assert plan.layers == len(adapted_weights(model))
        model.save_pretrained(tmp_path / "adapter")
        shapes = known_shapes(read_adapter(tmp_path / "adapter"), tmp_path / "base")
        assert len(shapes) == plan.layers


def test_a_config_serves_models_of_other_kinds():
    config = RandLoraConfig(r=3, target_modules=LLAMA_TARGETS)
    assert adapted_weights(get_peft_model(qwen3(), config)) == USUAL
    dense = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert adapted_weights(get_peft_model(llama(), config)) == expected_paths(*weights(*ATTENTION, *dense))
    assert config.target_parameters is None


def test_a_second_adapter_has_its_experts_too():
    model = adapt(qwen3(), LLAMA_TARGETS)
    model.add_adapter("second", RandLoraConfig(r=2, target_modules=LLAMA_TARGETS))
    layers = [layer for layer in model.modules() if isinstance(layer, RandLoraLayer)]
    assert all({"default", "second"} == set(layer.randlora_lambda) for layer in layers)
    assert len(layers) == len(USUAL)


def test_a_file_of_peft_without_experts_loads_without_experts(tmp_path):
    """PEFT's own RandLora takes the usual names for layers only."""
    config = TheirConfig(r=3, target_modules=LLAMA_TARGETS)
    theirs = randomise(TheirModel(qwen3(), {"default": config}, "default"))
    expected = theirs.model(input_ids=tokens()).logits.detach()
    state = {
        f"base_model.{name.removesuffix('.default')}": value.detach().clone()
        for name, value in theirs.state_dict().items()
        if "randlora_" in name
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(qwen3(), tmp_path)
    assert adapted_weights(ours) == expected_paths(*weights(*ATTENTION))
    assert_close(ours(input_ids=tokens()).logits.detach(), expected, 1e-5)
    save_shape(qwen3(), tmp_path / "base")
    assert len(known_shapes(read_adapter(tmp_path), tmp_path / "base")) == 2 * len(ATTENTION)


class TestFilesOfSingleExperts:
    """As Transformers 4 had them: each expert linear layers of its own."""

    def save(self, folder, targets):
        model = adapt(mixtral(), [name for name in targets if "proj" in name] or ["q_proj"])
        model.save_pretrained(folder)
        path = folder / "adapter_model.safetensors"
        content = load_file(path)
        if targets == ["w1", "w2", "w3"]:
            content = {name: value for name, value in content.items() if "self_attn" not in name}
        for layer in range(2):
            for expert in range(4):
                for name in ("w1", "w2", "w3"):
                    stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                    content[f"{stem}.randlora_lambda"] = torch.randn(3, 6)
                    content[f"{stem}.randlora_gamma"] = torch.randn(6, 16)
        save_file(content, path)
        written = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**written, "target_modules": targets}))

    @pytest.mark.parametrize("targets", [MIXTRAL, ["w1", "w2", "w3"]])
    def test_they_are_refused_with_the_reason(self, targets, tmp_path):
        self.save(tmp_path, targets)
        with pytest.raises((CheckpointError, ConfigError), match="all experts of a layer are one parameter"):
            PeftModel.from_pretrained(mixtral(), tmp_path)


class TestLeftOut:
    """Models that PEFT's tables do not know: LoRA is silent, RandLoRA warns."""

    @pytest.mark.parametrize(
        ("build", "targets"),
        [
            (qwen2, LLAMA_TARGETS),
            (qwen2, "all-linear"),
            (gpt_oss, "all-linear"),
            (gpt_oss, ["q_proj", "gate_up_proj", "down_proj"]),
            (mixtral, LLAMA_TARGETS),
        ],
    )
    def test_a_warning_says_how_to_adapt_them(self, build, targets):
        with pytest.warns(UserWarning, match=r"leaves out 4 stacks of experts' weights.*'down_proj', 'gate_up_proj'"):
            model = adapt(build(), targets)
        assert adapted_weights(model) == by_lora(build(), targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*leaves out")
            advised = adapt(build(), targets, target_parameters=["down_proj", "gate_up_proj"])
            assert adapted_weights(advised) == adapted_weights(model) | expected_paths(*STACKS)
            excluded = adapt(build(), targets, exclude_modules=["experts"])
            assert adapted_weights(excluded) == adapted_weights(model)

    def test_no_warning_where_no_expert_is_named(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*leaves out")
            adapt(gpt_oss(), ["q_proj", "v_proj"])
            adapt(llama(), LLAMA_TARGETS)


class Clipped(nn.Module):
    """As Gemma 4's: a linear layer, and bounds for its inputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.linear(x.clamp(-1, 1))


class TestRefusedModules:
    def test_a_router_is_refused_with_the_parameter_that_works(self):
        with pytest.raises(UnsupportedLayerError, match=r"`target_parameters=\['gate\.weight'\]`"):
            adapt(qwen2(), ["q_proj", "gate"])
        model = randomise(adapt(qwen2(), ["q_proj"], target_parameters=["gate.weight"]))
        assert "model.layers.1.mlp.gate.weight" in adapted_weights(model)
        before = qwen2().model.layers[1].mlp.gate(torch.ones(3, 16))
        after = model.base_model.model.model.layers[1].mlp.gate(torch.ones(3, 16))
        assert len(after) == len(before) == 3
        assert not torch.equal(after[0], before[0])

    def test_a_wrapper_is_refused_with_the_layer_inside_of_it(self):
        base = nn.ModuleDict({"q_proj": Clipped(), "v_proj": nn.Linear(6, 4)})
        with pytest.raises(UnsupportedLayerError, match=r"is a Clipped, .*`target_modules=\['q_proj\.linear'\]`"):
            adapt(base, ["q_proj", "v_proj"])
        assert adapted_weights(adapt(base, ["q_proj.linear", "v_proj"])) == {"q_proj.linear.weight", "v_proj.weight"}

    def test_gemma_4(self):
        from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
        from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

        base = nn.Sequential(Gemma4ClippableLinear(Gemma4VisionConfig(), 6, 4))
        with pytest.raises(UnsupportedLayerError, match=r"Gemma4ClippableLinear, .*`target_modules=\['0\.linear'\]`"):
            adapt(base, ["0"])
        assert adapted_weights(adapt(base, ["0.linear"])) == {"0.linear.weight"}
