"""Plans against what happens: counts exactly, memory as PyTorch's profiler sees it, cost as its counter counts."""

import copy
import dataclasses
import functools
import gc
import tempfile

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

import randlora
from randlora import ConfigError
from randlora.analysis import budget
from randlora.analysis.budget import Budget, Setup, choose_r, plan_training
from randlora.analysis.trace import _FLOPS
from randlora.ops import plan as planner
from reliability.limits import bounded

LLAMA = LlamaConfig(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)
GPT2 = GPT2Config(n_embd=96, n_layer=2, n_head=2, vocab_size=200, n_positions=128)
BERT = BertConfig(hidden_size=96, num_attention_heads=2, num_hidden_layers=2, intermediate_size=192, vocab_size=200)
MODELS = {"llama": (LLAMA, "causal-lm"), "gpt2": (GPT2, "causal-lm"), "bert": (BERT, "sequence-classification")}


def setup_of(config, folder, **changes) -> Setup:
    config.save_pretrained(folder)
    return Setup(**{"model": str(folder), "batch_size": 4, "length": 64, **changes})


@functools.cache
def planned(name, r=8, kind="dense"):
    """A plan that several tests look at."""
    config, task = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        return plan_training(setup_of(config, folder, task=task, kind=kind), Budget(r=r))


def build(config, task, method, r):
    """The real model, ready to train, as the plan counts it."""
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    model = auto.from_config(copy.deepcopy(config)).train()
    model.enable_input_require_grads()
    task_type = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}[task]
    if method == "full":
        return model
    if method == "LoRA":
        return peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules="all-linear", task_type=task_type))
    kind = {"very sparse": {"very_sparse": True}, "structured": {"structured": True}}.get(method, {})
    config = randlora.RandLoraConfig(r=r, target_modules="all-linear", task_type=task_type, **kind)
    return randlora.get_peft_model(model, config)


def batch(task):
    ids = torch.randint(200, (4, 64))
    return {"input_ids": ids, "labels": ids if task == "causal-lm" else ids[:, 0] % 2}


def steps(model, inputs, count):
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    for _ in range(count):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("r", [3, 8])
def test_counts_and_bytes_are_exact(name, r, tmp_path):
    config, task = MODELS[name]
    plan = planned(name, r)
    model = build(config, task, "RandLoRA", r)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.chosen.trainable == trainable
    assert plan.parameters == sum(p.numel() for p in build(config, task, "full", 0).parameters())
    lora = build(config, task, "LoRA", plan.lora.r)
    assert plan.lora.trainable == sum(p.numel() for p in lora.parameters() if p.requires_grad)
    for bases, expected in (("with", plan.chosen.file_bytes_with_bases), ("without", plan.chosen.file_bytes)):
        model.peft_config["default"].save_projection = bases == "with"
        model.save_pretrained(tmp_path / bases)
        found = (tmp_path / bases / "adapter_model.safetensors").stat().st_size
        assert expected <= found <= expected + 10_000  # the header


@pytest.mark.parametrize("method", ["RandLoRA", "very sparse", "structured", "LoRA", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_peak_memory_within_a_tenth(name, method):
    config, task = MODELS[name]
    kind = method.replace(" ", "_") if method in ("very sparse", "structured") else "dense"
    plan = planned(name, kind=kind)
    predicted = {"LoRA": plan.lora, "full": plan.full}.get(method, plan.chosen)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps(build(config, task, method, predicted.r), batch(task), 2)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert predicted.peak_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_products_within_30_percent_of_those_counted(name, tmp_path, monkeypatch):
    """With rates that count multiply-adds alone."""
    config, task = MODELS[name]
    monkeypatch.setattr(
        planner, "rates", planner.Rates(split=1.0, sparse=1.0, element=0.0, element_sparse=0.0, element_structured=0.0)
    )
    monkeypatch.setattr(budget, "ELEMENT", 0.0)
    monkeypatch.setattr(budget, "OPTIMIZER", 0.0)
    plan = plan_training(setup_of(config, tmp_path, task=task), Budget(r=8))

    def counted(model):
        with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
            model(**batch(task)).loss.backward()
        return counter.get_total_flops()

    base = counted(build(config, task, "full", 0).requires_grad_(False))
    structured = plan_training(setup_of(config, tmp_path, task=task, kind="structured"), Budget(r=8)).chosen
    assert plan.structured_cost == structured.cost  # told beside that of dense bases
    options = {"RandLoRA": plan.chosen, "LoRA": plan.lora, "full": plan.full, "structured": structured}
    for method, option in options.items():
        found = counted(build(config, task, method, option.r)) / base
        assert option.cost == pytest.approx(found, rel=0.3), method


class TestChoice:
    @given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4), st.integers(1, 20_000))
    def test_no_other_r_makes_more_of_a_budget(self, shapes, most):
        def count(r):
            return sum(-(-min(s) // r) * (r + min(s)) for s in shapes)

        counts = [count(r) for r in range(1, 61)]
        if min(counts) > most:
            with pytest.raises(ConfigError, match="no r fits"):
                choose_r(count, 60, most=most)
            return
        r = choose_r(count, 60, most=most)
        assert count(r) == max(c for c in counts if c <= most)
        assert r == 1 + counts.index(count(r))

    def test_a_larger_r_is_a_smaller_count(self, tmp_path):
        plan = plan_training(setup_of(LLAMA, tmp_path), Budget(percent=5))
        counts = [option.trainable for option in plan.options]
        assert counts == sorted(counts, reverse=True)
        assert plan.chosen in plan.options
        assert plan.chosen.percent <= 5

    def test_as_many_as_lora(self, tmp_path):
        plan = plan_training(setup_of(LLAMA, tmp_path), Budget(match_lora=4))
        assert plan.lora.r == 4
        assert plan.chosen.trainable == pytest.approx(plan.lora.trainable, rel=0.2)


def test_half_precision_weights_take_half(tmp_path):
    setup = setup_of(LLAMA, tmp_path)
    half = plan_training(dataclasses.replace(setup, dtype=torch.bfloat16), Budget(r=8))
    assert half.full.file_bytes * 2 == plan_training(setup, Budget(r=8)).full.file_bytes
    assert half.chosen.file_bytes == 4 * half.chosen.trainable


def test_a_model_that_looks_at_values_is_counted_all_the_same(tmp_path, monkeypatch):
    def data_dependent(*_args):
        raise RuntimeError("aten::nonzero")

    monkeypatch.setattr(budget, "trace_step", data_dependent)
    plan = plan_training(setup_of(LLAMA, tmp_path), Budget(r=8))
    assert plan.chosen.peak_bytes is None
    assert plan.chosen.trainable > 0
    assert "aten::nonzero" in plan.remark


def test_a_mixture_of_experts_is_planned(tmp_path):
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        vocab_size=64,
    )
    plan = plan_training(setup_of(config, tmp_path, targets=["q_proj", "v_proj"]), Budget(r=4))
    assert plan.layers == 2


def test_an_r_beyond_all_layers_is_noted(tmp_path):
    with pytest.warns(UserWarning, match=r"r=9000 is above \d+, the smaller dimension of the widest layer"):
        plan_training(setup_of(LLAMA, tmp_path), Budget(r=9000))


@pytest.mark.parametrize(
    ("budget_values", "setup_values", "expected"),
    [
        ({}, {}, "give one of"),
        ({"params": 10, "percent": 1.0}, {}, "give one of"),
        ({"params": 10}, {}, "no r fits a budget of 10 parameters: the fewest are"),
        ({"percent": 101.0}, {}, "percent=101.0"),
        ({"r": 0}, {}, "r=0"),
        ({"r": 4}, {"targets": ["nope"]}, "nope"),
        ({"r": 4}, {"length": 10_000}, "takes at most 2048 tokens"),
        ({"r": 4}, {"batch_size": 0}, "batch_size=0"),
        ({"r": 4}, {"kind": "sparsity"}, "kind=.sparsity. must be one of dense, sparse, very_sparse, structured"),
        ({"r": 4}, {"model": "nowhere"}, "'nowhere' is neither"),
    ],
)
def test_mistakes_are_named(budget_values, setup_values, expected, tmp_path):
    with pytest.raises(ConfigError, match=expected):
        plan_training(setup_of(LLAMA, tmp_path, **setup_values), Budget(**budget_values))


def test_a_plan_for_layers_of_any_size_takes_no_memory_of_their_size(tmp_path):
    size = 2**20  # γ of r = 1 would be 4 TB
    config = LlamaConfig(hidden_size=size, intermediate_size=size, num_hidden_layers=1, num_attention_heads=4)
    with bounded():
        found = plan_training(setup_of(config, tmp_path), Budget(r=64))
    assert found.chosen.trainable == 7 * (size // 64) * (64 + size)
    assert not found.remark
