"""Names in a config that match nothing are warned of, each by itself; those that nobody gave are not."""

import warnings

import pytest
from peft import TaskType
from transformers import MixtralConfig, MixtralForCausalLM

from randlora import PeftModel, RandLoraConfig, get_peft_model

from .helpers import LLAMA_TARGETS, bert, llama


def mixtral():
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4))


def said(base, **config):
    """The warnings of adapting ``base``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(base, RandLoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"], **config}))
    return [str(w.message) for w in caught if w.category is not FutureWarning]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj", "typo"]}, "target_modules: 'typo'"),
        ({"target_modules": ["q_proj", "k_prj"]}, "target_modules: 'k_prj' (is it 'k_proj'?)"),
        ({"target_modules": ["q_proj", "mlp.downproj"]}, "target_modules: 'mlp.downproj' (is it 'mlp.down_proj'?)"),
        ({"exclude_modules": ["encoder", "q_proj"]}, "exclude_modules: 'encoder'"),
        ({"exclude_modules": ["vproj"]}, "exclude_modules: 'vproj' (is it 'v_proj'?)"),
        ({"exclude_modules": r".*layers\.7\..*"}, r"exclude_modules: '.*layers\\.7\\..*'"),
        ({"rank_pattern": {"q_proj": 2, "k_proj": 2}}, "rank_pattern: 'k_proj'"),
        ({"alpha_pattern": {r"layers\.[01]\.q": 2.0}}, r"alpha_pattern: 'layers\\.[01]\\.q'"),
        ({"modules_to_save": ["lm_head", "lmhead"]}, "modules_to_save: 'lmhead' (is it 'lm_head'?)"),
        ({"layers_to_transform": [1, 2]}, "layers_to_transform: '2'"),
        ({"target_parameters": ["norm.wight"]}, "target_parameters: 'norm.wight' (is it 'norm.weight'?)"),
    ],
)
def test_one_name_that_matches_nothing(config, expected):
    start = "the config of the adapter 'default' has names that match nothing in LlamaForCausalLM and have no effect: "
    assert said(llama(), **config) == [start + expected]


def test_several_in_one_warning():
    (message,) = said(llama(), target_modules=["q_proj", "one", "two"], rank_pattern={"three": 2})
    assert message.endswith("target_modules: 'one', target_modules: 'two', rank_pattern: 'three'")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": LLAMA_TARGETS, "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": r".*\.q_proj", "exclude_modules": r".*\.1\..*"},
        {"exclude_modules": ["layers.1.self_attn.q_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
        {"alpha_pattern": {r"layers\.[01]\.self_attn\.q_proj": 2.0}, "modules_to_save": ["head"]},
    ],
)
def test_names_that_match(config):
    assert said(llama(), **config) == []


def test_former_names_of_experts_match_and_patterns_that_cannot_are_told_the_new_name():
    targets = ["q_proj", "w1", "w2", "w3"]
    assert said(mixtral(), target_modules=targets) == []
    assert said(mixtral(), target_modules=targets, rank_pattern={"experts.down_proj": 2}) == []
    (message,) = said(mixtral(), target_modules=targets, rank_pattern={"w1": 2})
    assert message.endswith("rank_pattern: 'w1' (now 'gate_up_proj')")


def test_heads_that_peft_adds_are_not_warned_of():
    assert said(bert(), target_modules=["query"], task_type=TaskType.SEQ_CLS) == []


def test_the_usual_targets_of_an_architecture_are_not_warned_of(monkeypatch):
    from randlora import RandLoraModel

    monkeypatch.setitem(RandLoraModel.target_module_mapping, "llama", ["q_proj", "of_older_versions"])
    assert said(llama(), target_modules=None) == []


def test_a_saved_adapter_loads_quietly(tmp_path):
    with pytest.warns(UserWarning, match="names that match nothing"):
        model = get_peft_model(
            llama(),
            RandLoraConfig(r=3, target_modules=["q_proj", "typo"], exclude_modules=["other"], rank_pattern={"x": 2}),
        )
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(llama(), tmp_path)
        model.load_adapter(tmp_path, "second")


def test_a_second_adapter_is_looked_at_too():
    model = get_peft_model(llama(), RandLoraConfig(r=3, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*match nothing")
        model.add_adapter("second", RandLoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    with pytest.warns(UserWarning, match="the adapter 'third' .*target_modules: 'qproj'"):
        model.add_adapter("third", RandLoraConfig(r=3, target_modules=["q_proj", "qproj"]))
