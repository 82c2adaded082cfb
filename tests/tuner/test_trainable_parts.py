"""What trains beside the updates: biases, whole modules, single tokens, tied embeddings; and in which layers."""

import warnings

import pytest
import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from randlora import ConfigError, RandLoraConfig, get_peft_model
from randlora.convert import save_merged, to_lora

from .helpers import (
    LLAMA_TARGETS,
    assert_close,
    assert_same_tensors,
    layers_of,
    llama,
    output,
    randomise,
    snapshot,
    stack,
    tokens,
)

TOKENS = [1, 4, 7]


def tied():
    return llama(tie_word_embeddings=True)


def adapted(build=llama, **config):
    values = {"r": 4, "randlora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    return randomise(get_peft_model(build(), RandLoraConfig(**values)))


def train(model, steps=3):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


PARTS = {
    "bias": {"bias": "all"},
    "bias of adapted layers": {"bias": "randlora_only"},
    "module": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": TOKENS},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": TOKENS}},
    "tokens and module": {"trainable_token_indices": TOKENS, "modules_to_save": ["lm_head"]},
    "patterns": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
}
TIED = {
    "tied module": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied module by its other name": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "tied tokens": {"trainable_token_indices": TOKENS, "ensure_weight_tying": True},
    "tied tokens unasked": {"trainable_token_indices": TOKENS},
}
ALL = {name: (biased, part) for name, part in PARTS.items() for biased in [lambda: llama(attention_bias=True)]}
ALL |= {name: (tied, part) for name, part in TIED.items()}


@pytest.mark.parametrize(("build", "part"), ALL.values(), ids=ALL)
class TestEveryPart:
    def test_trains_is_saved_and_loaded(self, build, part, tmp_path):
        model = train(adapted(build, **part))
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", message="You have requested `ensure_weight_tying`")  # PEFT sees no tokens
            loaded = PeftModel.from_pretrained(build(), tmp_path)
        assert torch.equal(output(loaded), output(model))

    def test_is_merged(self, build, part, tmp_path):
        model = train(adapted(build, **part))
        expected = output(model).detach()
        save_merged(model, tmp_path / "merged")
        assert_close(output(type(build()).from_pretrained(tmp_path / "merged")).detach(), expected, 1e-5)
        assert_close(output(model.merge_and_unload()).detach(), expected, 1e-5)

    def test_goes_with_the_lora(self, build, part, tmp_path):
        model = train(adapted(build, **part))
        to_lora(model, energy=1.0).save(tmp_path)
        assert_close(output(PeftModel.from_pretrained(build(), tmp_path)).detach(), output(model).detach(), 1e-5)

    def test_the_base_model_is_not_touched(self, build, part):
        model = train(adapted(build, **part))
        if "bias" in part:
            return  # biases are those of the base model, in PEFT's LoRA as well
        with model.disable_adapter():
            assert torch.equal(output(model), output(build()))


class TestTokens:
    def test_only_they_are_trained(self):
        model = adapted(trainable_token_indices=TOKENS)
        before = model.get_input_embeddings().weight.detach().clone()
        train(model)
        changed = (model.get_input_embeddings().weight != before).any(dim=1).nonzero().flatten().tolist()
        assert 4 in tokens()
        assert {4} <= set(changed) <= set(TOKENS)

    def test_two_adapters_have_their_own(self):
        model = adapted(trainable_token_indices=[1])
        model.add_adapter("y", RandLoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[1, 2]))
        for name, value in (("default", 0.5), ("y", -0.5)):
            model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta[name].data.fill_(value)
        batch = torch.tensor([[1, 2, 3]])
        first = model(input_ids=batch).logits
        model.set_adapter("y")
        second = model(input_ids=batch).logits
        assert not torch.equal(first, second)
        model.eval()
        mixed = model(input_ids=batch.expand(2, -1), adapter_names=["y", "default"]).logits
        assert_close(mixed.detach(), torch.cat([second, first]).detach(), 1e-5)


class TestTiedEmbeddings:
    @pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
    def test_modules_stay_one_weight(self, named):
        model = train(adapted(tied, modules_to_save=[named], ensure_weight_tying=True))
        inputs, outputs = model.get_input_embeddings(), model.base_model.model.lm_head
        assert isinstance(inputs, ModulesToSaveWrapper)
        assert inputs.modules_to_save["default"].weight is outputs.modules_to_save["default"].weight
        assert not torch.equal(inputs.modules_to_save["default"].weight, inputs.original_module.weight)

    def test_tokens_stay_one_weight(self):
        model = train(adapted(tied, trainable_token_indices=TOKENS, ensure_weight_tying=True))
        inputs, outputs = model.get_input_embeddings(), model.base_model.model.lm_head
        assert isinstance(outputs, TrainableTokensWrapper)
        assert torch.equal(inputs.weight, outputs.weight)

    def test_an_update_of_both_is_refused_and_leaves_the_model(self):
        model = tied()
        before = snapshot(model)
        config = RandLoraConfig(r=4, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
        with pytest.raises(ConfigError, match="modules_to_save") as raised:
            get_peft_model(model, config)
        assert "lm_head" in str(raised.value)
        assert_same_tensors(model.state_dict(), before)
        assert not layers_of(model)

    def test_an_update_of_one_alone_is_warned_of(self):
        with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
            adapted(tied, target_modules=["lm_head"])


class TestWhichLayers:
    @pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"]])
    @pytest.mark.parametrize(("chosen", "expected"), [(0, {0}), ([1], {1}), ([0, 1], {0, 1})])
    def test_layers_to_transform(self, chosen, expected, pattern):
        model = adapted(layers_to_transform=chosen, layers_pattern=pattern)
        found = {int(name.split("layers.")[1].split(".")[0]) for name in layers_of(model)}
        assert found == expected

    def test_a_pattern_of_another_model_finds_nothing(self):
        with pytest.raises(ValueError, match="layers_pattern"):
            adapted(layers_to_transform=[0], layers_pattern="blocks")

    def test_patterns_of_rank_and_alpha(self):
        model = adapted(
            target_modules=LLAMA_TARGETS,
            rank_pattern={r"layers\.1\..*": 3, "q_proj": 2},
            alpha_pattern={"down_proj": 20},
        )
        for name, layer in layers_of(model).items():
            rank = 3 if "layers.1." in name else 2 if "q_proj" in name else 4
            assert layer.r["default"] == rank
            assert layer.scaling["default"] == (20 if "down_proj" in name else 8) / rank


class TestWhatTrains:
    @pytest.mark.parametrize(
        ("part", "expected"),
        [
            ({"bias": "none"}, 0),
            ({"bias": "randlora_only"}, 4),
            ({"bias": "all"}, 8),
        ],
        ids=str,
    )
    def test_biases(self, part, expected):
        model = adapted(lambda: llama(attention_bias=True), **part)
        assert sum(name.endswith(".bias") for name, p in model.named_parameters() if p.requires_grad) == expected

    def test_nothing_else(self):
        model = adapted(modules_to_save=["lm_head"], trainable_token_indices=TOKENS)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        kinds = (
            "randlora_lambda.default",
            "randlora_gamma.default",
            "modules_to_save.default",
            "trainable_tokens_delta",
        )
        assert all(any(kind in name for kind in kinds) for name in trainable)
        assert all(any(kind in name for name in trainable) for kind in kinds)


def test_a_second_adapter_trains_nothing_before_it_is_active():
    """Its copy of the head is one of a module whose bias trains; PEFT would let the copy's train too."""
    values = {"r": 4, "target_modules": ["tall"], "modules_to_save": ["head"]}
    model = get_peft_model(stack(), RandLoraConfig(bias="all", **values))
    model.add_adapter("second", RandLoraConfig(**values))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ".second" in name]


def test_an_adapter_with_biases_stays_the_only_one_of_that_kind():
    model = adapted(bias="all")
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("y", RandLoraConfig(target_modules=["q_proj"], bias="all"))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("y", RandLoraConfig(r=4, target_modules=["q_proj"]))
