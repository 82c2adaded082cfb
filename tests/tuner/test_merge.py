"""Merging: exact to undo, equal in effect, and refused as a whole."""

import copy
import warnings

import pytest
import torch
from torch import nn

from randlora import MergeError, RandLoraConfig, get_peft_model

from .helpers import (
    MODELS,
    STACK_TARGETS,
    Stack,
    adapted,
    assert_close,
    assert_same_tensors,
    layers_of,
    output,
    randomise,
    snapshot,
    stack,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def trained(name="stack", dtype=torch.float32, second=False):
    build, targets = MODELS[name]
    model = adapted(lambda: build().to(dtype), targets)
    if second:
        model.add_adapter(
            "second", RandLoraConfig(r=3, randlora_alpha=4, sparse=True, projection_prng_key=2, target_modules=targets)
        )
        randomise(model, "second", seed=7).eval()
    return model


@pytest.mark.parametrize("name", MODELS)
@DTYPES
class TestWholeModels:
    def test_merged_output_and_bit_exact_unmerge(self, name, dtype):
        model = trained(name, dtype)
        before, state = output(model, dtype).detach(), snapshot(model)
        model.merge_adapter()
        assert_close(output(model, dtype).detach(), before, TOLERANCE[dtype])
        for layer_name, layer in layers_of(model).items():
            assert not torch.equal(layer.get_base_layer().weight, state[f"{layer_name}.base_layer.weight"])
        model.unmerge_adapter()
        assert_same_tensors(model.state_dict(), state)
        assert torch.equal(output(model, dtype), before)

    def test_merge_and_unload(self, name, dtype):
        model = trained(name, dtype)
        plain, before = MODELS[name][0]().to(dtype), output(model, dtype).detach()
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged) is type(plain)
        assert list(merged.state_dict()) == list(plain.state_dict())
        assert not layers_of(merged)
        assert_close(output(merged, dtype).detach(), before, TOLERANCE[dtype])


@DTYPES
class TestSeveralAdapters:
    def test_all_at_once(self, dtype):
        model = trained(dtype=dtype, second=True)
        state = snapshot(model)
        model.base_model.set_adapter(["default", "second"])
        before = output(model, dtype).detach()
        model.merge_adapter()
        assert all(layer.merged_adapters == ["default", "second"] for layer in layers_of(model).values())
        assert_close(output(model, dtype).detach(), before, TOLERANCE[dtype])
        model.unmerge_adapter()
        assert_same_tensors(model.state_dict(), state)

    def test_one_after_the_other(self, dtype):
        model = trained(dtype=dtype, second=True)
        state = snapshot(model)
        model.base_model.set_adapter(["default", "second"])
        before = output(model, dtype).detach()
        model.merge_adapter(["second"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "additionally merging"
            model.merge_adapter(["default"])
        assert_close(output(model, dtype).detach(), before, TOLERANCE[dtype])
        model.unmerge_adapter()
        assert_same_tensors(model.state_dict(), state)

    def test_a_chosen_one(self, dtype):
        model = trained(dtype=dtype, second=True)
        model.set_adapter("second")
        expected = output(model, dtype).detach()
        model.set_adapter("default")
        model.merge_adapter(["second"])
        assert_close(output(model, dtype).detach(), expected, TOLERANCE[dtype])

    def test_merge_and_unload_of_a_chosen_one(self, dtype):
        model = trained(dtype=dtype, second=True)
        model.set_adapter("second")
        expected = output(model, dtype).detach()
        model.set_adapter("default")
        assert_close(
            output(model.merge_and_unload(adapter_names=["second"]), dtype).detach(), expected, TOLERANCE[dtype]
        )

    def test_many_times(self, dtype):
        model = trained(dtype=dtype, second=True)
        state = snapshot(model)
        for _ in range(20):
            model.merge_adapter()
            model.unmerge_adapter()
        assert_same_tensors(model.state_dict(), state)


class TestSafeMerge:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("where", ["tall", "wide", "square"])
    def test_refused_in_one_layer_is_refused_in_all(self, value, where):
        model = trained()
        getattr(model.base_model.model, where).randlora_gamma["default"].data[0, 0] = value
        state = snapshot(model)
        with pytest.raises(MergeError, match="default"):
            model.merge_adapter(safe_merge=True)
        assert not any(layer.merged for layer in layers_of(model).values())
        after = snapshot(model)
        for name in state:
            assert torch.equal(after[name].nan_to_num(7), state[name].nan_to_num(7)), name
        with model.disable_adapter():
            assert torch.equal(output(model), output(stack()))

    def test_overflow_of_half_precision_is_refused(self):
        model = trained(dtype=torch.float16)
        model.base_model.model.wide.randlora_gamma["default"].data.fill_(1e6)
        with pytest.raises(MergeError, match="not finite"):
            model.merge_adapter(safe_merge=True)
        assert not any(layer.merged for layer in layers_of(model).values())

    def test_merge_and_unload_is_refused_too_and_leaves_a_model_that_works(self):
        model = trained()
        model.base_model.model.square.randlora_gamma["default"].data[0, 0] = float("nan")
        as_peft_says_it = "NaNs detected in the merged weights. The adapter default seems to be broken"
        with pytest.raises(ValueError, match=as_peft_says_it):
            model.merge_and_unload(safe_merge=True)
        with model.disable_adapter():
            assert torch.equal(output(model), output(stack()))

    def test_an_earlier_merge_survives_a_refused_one(self):
        model = trained(second=True)
        model.merge_adapter(["default"])
        before = output(model)
        model.base_model.model.square.randlora_gamma["second"].data[0, 0] = float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(MergeError):
                model.merge_adapter(["second"], safe_merge=True)
        merged = {tuple(layer.merged_adapters) for layer in layers_of(model).values()}
        assert merged == {("default",)}
        assert torch.equal(output(model), before)


class TestInBetween:
    @pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float64])
    def test_cast_while_merged(self, to):
        model = trained()
        plain = stack().to(to)
        model.merge_adapter()
        model.to(to)
        model.unmerge_adapter()
        for name in STACK_TARGETS:
            weight = getattr(model.base_model.model, name).get_base_layer().weight
            assert weight.dtype == to
            assert torch.equal(weight, getattr(plain, name).weight)

    def test_disable_while_merged(self):
        model = trained()
        before = output(model)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(output(model), output(stack()))
        assert torch.equal(output(model), before)
        assert not any(layer.merged for layer in layers_of(model).values())

    def test_unmerge_when_not_merged_warns_and_changes_nothing(self):
        model = trained()
        state = snapshot(model)
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()
        assert_same_tensors(model.state_dict(), state)

    def test_training_after_unmerge(self):
        model = trained()
        expected = copy.deepcopy(model)
        model.merge_adapter()
        model.unmerge_adapter()
        for m in (model, expected):
            output(m).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name

    def test_deleting_a_merged_adapter_leaves_the_base(self):
        model = trained(second=True)
        model.merge_adapter(["default"])
        model.unmerge_adapter()
        model.set_adapter("second")
        model.delete_adapter("default")
        with model.disable_adapter():
            assert torch.equal(output(model), output(stack()))

    def test_a_deep_copy_of_a_merged_model_unmerges_exactly(self):
        model = trained()
        state = snapshot(model)
        model.merge_adapter()
        twin = copy.deepcopy(model)
        model.unmerge_adapter()
        twin.unmerge_adapter()
        assert_same_tensors(twin.state_dict(), state)
        twin.merge_adapter()
        assert_same_tensors(model.state_dict(), state)

    def test_the_state_dict_of_a_merged_model_saves_the_adapter(self, tmp_path):
        model = trained()
        before = output(model)
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        from randlora import PeftModel

        assert torch.equal(output(PeftModel.from_pretrained(stack(), tmp_path)), before)

    def test_the_kept_weight_is_freed_by_unmerging(self):
        model = trained()
        model.merge_adapter()
        model.unmerge_adapter()
        held = [v for layer in layers_of(model).values() for v in vars(layer).values() if isinstance(v, torch.Tensor)]
        assert not held


def test_merge_with_a_trainable_bias_keeps_it():
    config = RandLoraConfig(r=4, bias="all", target_modules=STACK_TARGETS)
    model = randomise(get_peft_model(stack(), config))
    model.base_model.model.tall.get_base_layer().bias.data.fill_(0.25)
    before = output(model).detach()
    merged = model.merge_and_unload()
    assert type(merged) is Stack
    assert isinstance(merged.tall, nn.Linear)
    assert torch.equal(merged.tall.bias, torch.full((17,), 0.25))
    assert_close(output(merged).detach(), before, 1e-5)


def assign(model, state):
    model.load_state_dict(state, assign=True)


def write_past_the_counter(model, state):
    dict(model.named_parameters())["base_model.model.tall.base_layer.weight"].data.mul_(2)


def swap_rows(model, state):
    weight = dict(model.named_parameters())["base_model.model.tall.base_layer.weight"]
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]


@pytest.mark.parametrize("change", [lambda m, s: m.load_state_dict(s), assign, write_past_the_counter, swap_rows])
def test_a_base_weight_that_is_changed_while_merged_is_not_replaced_silently(change):
    model = randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 if name.endswith("base_layer.weight") else value for name, value in before.items()}
    model.merge_adapter()
    merged = copy.deepcopy(model.state_dict())
    change(model, state)
    changed = copy.deepcopy(model.state_dict())
    with pytest.raises(MergeError, match="was changed while default was merged"):
        model.unmerge_adapter()
    assert_same_tensors(dict(model.state_dict()), changed)
    model.load_state_dict(merged)
    model.unmerge_adapter()
    assert_same_tensors(dict(model.state_dict()), before)


def test_a_merged_model_that_is_cast_and_moved_unmerges():
    model = randomise(get_peft_model(stack(), RandLoraConfig(r=4, target_modules=STACK_TARGETS)))
    expected = copy.deepcopy(model).double().state_dict()
    model.merge_adapter()
    copy.deepcopy(model.double()).unmerge_adapter()
    model.unmerge_adapter()
    assert_same_tensors(dict(model.state_dict()), dict(expected))
