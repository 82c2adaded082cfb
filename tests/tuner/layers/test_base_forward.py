"""Base layers that compute something else than torch's own class does: called as they are, merged only where right."""

import copy
import subprocess
import sys

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from transformers import BitConfig, BitModel, OPTConfig, OPTForCausalLM
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from randlora import MergeError, RandLoraConfig, UnsupportedLayerError, get_peft_model

from ..helpers import assert_close, assert_same_tensors, conv1d, randomise, snapshot

KINDS = {
    "linear": (lambda: nn.Linear(7, 5), lambda: torch.randn(3, 7)),
    "conv1d of transformers": (lambda: conv1d(7, 5), lambda: torch.randn(3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: torch.randn(2, 2, 4, 5, 3)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: torch.randint(0, 9, (2, 4))),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def made(kind):
    torch.manual_seed(0)
    make, draw = KINDS[kind]
    return make(), draw()


def adapted(base, trained=True):
    model = get_peft_model(nn.Sequential(base), RandLoraConfig(r=2, randlora_alpha=4, target_modules=["0"]))
    if trained:
        randomise(model)
    return model.eval()


def with_update(base, x, update):
    """The update's output alone, by torch's own functions in float64."""
    update, wide = update.detach().double(), x.double() if x.is_floating_point() else x
    if isinstance(base, Conv1D):
        return wide @ update
    if isinstance(base, nn.Linear):
        return F.linear(wide, update)
    if isinstance(base, nn.Embedding):
        return F.embedding(x, update)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(base.kernel_size)]
    return convolve(wide, update, None, base.stride, base.padding, base.dilation, base.groups)


class Halved(ModelHook):
    def post_forward(self, module, output):
        return output / 2


class DiffusersHalved(DiffusersHook):
    def post_forward(self, module, output):
        return output / 2


def by_attribute(base, monkeypatch):
    plain = base.forward
    base.forward = lambda x: plain(x) / 2


def by_class(base, monkeypatch):
    plain = type(base).forward
    monkeypatch.setattr(type(base), "forward", lambda self, x: plain(self, x) / 2)


def by_call(base, monkeypatch):
    plain = nn.Module.__call__
    halve = lambda self, *args, **kwargs: plain(self, *args, **kwargs) / (2 if self is base else 1)  # noqa: E731
    monkeypatch.setattr(nn.Module, "__call__", halve)


def by_call_impl(base, monkeypatch):
    plain = base._call_impl
    base._call_impl = lambda *args, **kwargs: plain(*args, **kwargs) / 2


def by_accelerate(base, monkeypatch):
    add_hook_to_module(base, Halved())


def by_diffusers(base, monkeypatch):
    HookRegistry.check_if_exists_or_initialize(base).register_hook(DiffusersHalved(), "halved")


def by_hook(base, monkeypatch):
    base.register_forward_hook(lambda module, args, output: output / 2)


def by_global_hook(base, monkeypatch):
    halve = lambda module, args, output: output / 2 if module is base else output  # noqa: E731
    monkeypatch.setattr(torch_module, "_global_forward_hooks", {0: halve})


WAYS = [by_attribute, by_class, by_call, by_call_impl, by_accelerate, by_diffusers, by_hook, by_global_hook]


@ALL
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before", "after"])
class TestReplaced:
    """Every way of replacing what a layer does, here by half of it, before it is adapted and after."""

    def build(self, kind, way, when, monkeypatch, trained):
        base, x = made(kind)
        full = base(x).detach()
        if when == "before":
            way(base, monkeypatch)
        model = adapted(base, trained)
        if when == "after":
            way(base, monkeypatch)
        return model, base, x, full

    def test_a_fresh_adapter_changes_nothing(self, kind, way, when, monkeypatch):
        model, _, x, full = self.build(kind, way, when, monkeypatch, trained=False)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert_close(model(x).detach(), full / 2, 1e-6)

    def test_the_update_is_added_to_what_the_layer_gives(self, kind, way, when, monkeypatch):
        model, base, x, full = self.build(kind, way, when, monkeypatch, trained=True)
        update = model.base_model.model[0].get_delta_weight("default")
        expected = full / 2 + with_update(base, x, update)
        for _ in range(3):
            with torch.no_grad():
                assert_close(model(x), expected, 1e-5)
        y = model(x)
        assert_close(y.detach(), expected, 1e-5)
        y.sum().backward()
        assert model.base_model.model[0].randlora_gamma["default"].grad.abs().sum() > 0

    def test_merging_is_refused(self, kind, way, when, monkeypatch):
        model, base, x, _ = self.build(kind, way, when, monkeypatch, trained=True)
        before, state = model(x).detach(), snapshot(model)
        layer = model.base_model.model[0]
        for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
            for safe in (False, True):
                with pytest.raises(MergeError, match=f"'0', a {type(base).__name__}"):
                    merge(safe_merge=safe)
                assert not layer.merged
                assert_same_tensors(model.state_dict(), state)
        assert torch.equal(model(x).detach(), before)


PATCHED_EARLY = """
import torch
from torch import nn
import functools
plain = nn.Linear.forward
@functools.wraps(plain)
def halved(self, x):
    return plain(self, x) / 2
nn.Linear.forward = halved
from randlora import RandLoraConfig, get_peft_model
torch.manual_seed(0)
base, x = nn.Linear(7, 5), torch.randn(3, 7)
expected = (x @ base.weight.T + base.bias) / 2
model = get_peft_model(nn.Sequential(base), RandLoraConfig(r=2, target_modules=["0"]))
torch.testing.assert_close(model(x), expected)
nn.Linear.forward = plain
torch.testing.assert_close(model(x), expected * 2)
"""


def test_a_class_that_was_patched_before_randlora_was_imported():
    done = subprocess.run([sys.executable, "-c", PATCHED_EARLY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class TestReplacedProducts:
    def test_a_function_mode_sees_the_product(self):
        class Halve(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                return result / 2 if func is F.linear and args[1] is base.weight else result

        base, x = made("linear")
        model = adapted(base, trained=False)
        with Halve():
            assert_close(model(x).detach(), base(x).detach(), 1e-6)

    @pytest.mark.parametrize("kind", ["linear", "conv2d"])
    def test_a_function_of_torch_that_was_replaced_is_called(self, kind, monkeypatch):
        base, x = made(kind)
        name, seen = {"linear": "linear", "conv2d": "conv2d"}[kind], []
        plain = getattr(F, name)

        def counted(x, weight, *args):
            seen.append(weight is base.weight)
            return plain(x, weight, *args)

        model = adapted(base, trained=False)
        monkeypatch.setattr(F, name, counted)
        model(x)
        assert sum(seen) == 1

    def test_a_convolution_of_other_geometry(self):
        """The well-known trick for images that tile: both products wrap around."""
        base, x = made("conv1d")
        base._conv_forward = lambda x, weight, bias: F.conv1d(F.pad(x, (1, 1), mode="circular"), weight, bias)
        model = adapted(base)
        total = base.weight + model.base_model.model[0].get_delta_weight("default")
        expected = F.conv1d(F.pad(x.double(), (1, 1), mode="circular"), total.double(), base.bias.double()).detach()
        assert_close(model(x).detach(), expected, 1e-5)
        model.merge_adapter()
        assert_close(model(x).detach(), expected, 1e-5)

    @pytest.mark.parametrize(
        "other",
        [
            lambda plain: lambda x, weight, bias: plain(x, weight / weight.std(), bias),
            lambda plain: lambda x, weight, bias: plain(x, weight, bias) + 1,
        ],
    )
    def test_a_convolution_that_no_update_has(self, other):
        base, x = made("conv2d")
        base._conv_forward = other(base._conv_forward)
        model = adapted(base)
        with pytest.raises(UnsupportedLayerError, match=r"'0', a Conv2d.*_conv_forward.*exclude_modules"):
            model(x)
        with pytest.raises(MergeError, match="'0', a Conv2d"):
            model.merge_adapter()

    def test_a_replaced_function_of_torch_is_tried_before_merging(self, monkeypatch):
        base, x = made("linear")
        model = adapted(base)
        before = model(x).detach()
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", lambda x, weight, bias=None: x @ weight.T + bias)
            model.merge_adapter()
            assert_close(model(x).detach(), before, 1e-5)
        model.unmerge_adapter()
        plain = F.linear
        monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: plain(x, weight.sign(), bias))
        with pytest.raises(MergeError, match="'0', a Linear"):
            model.merge_adapter()


def test_the_product_of_plain_layers_is_taken():
    """Else the plan that does both products together would be lost, with no wrong result to show it."""
    for kind in set(KINDS) - {"embedding"}:
        base, x = made(kind)
        layer = adapted(base).base_model.model[0]
        assert layer._plain_weight("default", x) is base.weight
        with torch.device("cpu"):
            assert layer._plain_weight("default", x) is base.weight
        add_hook_to_module(base, ModelHook())
        assert layer._plain_weight("default", x) is None
        remove_hook_from_module(base)  # which leaves a bound method behind
        assert layer._plain_weight("default", x) is base.weight


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.tril(), self.bias)


class Typed(nn.Linear):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return torch.matmul(x, self.weight.T) + self.bias


class Inherits(nn.Linear):
    pass


def timm_conv():
    class ScaledStdConv2d(nn.Conv2d):
        """As timm's: every filter is standardised, and has a gain."""

        def forward(self, x):
            weight = self.weight.flatten(1)
            normed = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
            return F.conv2d(x, normed.reshape(self.weight.shape), self.bias, self.stride, self.padding)

    return ScaledStdConv2d(4, 6, 3, padding=1)


class TestSubclasses:
    @pytest.mark.parametrize("kind", [lambda: Scaled(7, 5), lambda: Masked(7, 5), timm_conv])
    def test_a_weight_that_is_no_plain_product_is_not_merged(self, kind):
        torch.manual_seed(0)
        base = kind()
        x = torch.randn(2, 7) if isinstance(base, nn.Linear) else torch.randn(2, 4, 6, 6)
        plain = base(x).detach()
        model = adapted(base)
        layer = model.base_model.model[0]
        expected = plain + with_update(base, x, layer.get_delta_weight("default"))
        assert_close(model(x).detach(), expected, 1e-5)
        randomise(model, scale=1e-7)  # however small the update is
        with pytest.raises(MergeError, match=f"'0', a {type(base).__name__}.*exclude_modules"):
            model.merge_adapter()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", [Typed, Inherits, FalconLinear])
    def test_a_plain_product_of_another_class_is_merged(self, kind, dtype):
        torch.manual_seed(0)
        model = adapted(kind(70, 50).to(dtype))
        x = torch.randn(4, 70).to(dtype)
        before = model(x).detach()
        model.merge_adapter()
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        assert_close(model(x).detach(), before, tolerance)

    def test_one_refusal_leaves_nothing_merged(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 7), Scaled(7, 7), nn.Linear(7, 7))
        model = randomise(get_peft_model(model, RandLoraConfig(r=2, target_modules=["0", "1", "2"])))
        state, x = snapshot(model), torch.randn(2, 7)
        before = model(x).detach()
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError, match="'1', a Scaled"):
                merge()
            assert not any(layer.merged for layer in model.base_model.model)
        assert_same_tensors(model.state_dict(), state)
        assert torch.equal(model(x), before)
        assert type(model.unload()[1]) is Scaled

    def test_trying_leaves_modes_and_generators_alone(self):
        class Dropping(nn.Linear):
            def __init__(self, *args):
                super().__init__(*args)
                self.drop = nn.Dropout(0.5)

            def forward(self, x):
                return super().forward(self.drop(x))

        model = adapted(Dropping(7, 5)).train()
        state = torch.get_rng_state()
        model.merge_adapter()
        assert torch.equal(torch.get_rng_state(), state)
        base = model.base_model.model[0].get_base_layer()
        assert base.training
        assert base.drop.training

    def test_bit_of_transformers(self):
        torch.manual_seed(0)
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 2}
        plain = BitModel(BitConfig(layer_type="preactivation", **sizes)).eval()
        x = torch.randn(1, 3, 32, 32)
        expected = plain(x).last_hidden_state.detach()
        fresh = get_peft_model(copy.deepcopy(plain), RandLoraConfig(r=2, target_modules=["conv1", "conv2"])).eval()
        assert_close(fresh(x).last_hidden_state.detach(), expected, 1e-6)
        before = randomise(fresh)(x).last_hidden_state.detach()
        assert any(isinstance(module, WeightStandardizedConv2d) for module in fresh.modules())
        with pytest.raises(MergeError, match="WeightStandardizedConv2d"):
            fresh.merge_and_unload()
        assert torch.equal(fresh(x).last_hidden_state, before)

    def test_a_router_that_returns_a_tuple_is_named(self):
        config = type("Config", (), {"hidden_size": 8, "num_local_experts": 4, "num_experts_per_tok": 1})
        model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), Llama4Router(config)))
        model = get_peft_model(model, RandLoraConfig(r=2, target_modules="all-linear"))
        with pytest.raises(UnsupportedLayerError, match=r"'0\.1', a Llama4Router.*tuple.*exclude_modules"):
            model(torch.randn(3, 8))

    def test_an_output_of_another_shape_is_named(self):
        class Causal(nn.Conv1d):
            def forward(self, x):
                return super().forward(F.pad(x, (2, 0)))

        model = adapted(Causal(4, 6, 3))
        with pytest.raises(UnsupportedLayerError, match=r"'0', a Causal.*\(2, 6, 3\).*\(2, 6, 1\).*exclude_modules"):
            model(torch.randn(2, 4, 3))  # one column would be added to all three


class Normed(nn.Embedding):
    def forward(self, ids):
        return F.layer_norm(super().forward(ids), (self.embedding_dim,))


class TestEmbeddings:
    def test_positions_are_looked_up_where_the_model_looks(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "ffn_dim": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
        plain = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=24, word_embed_proj_dim=16)).eval()
        ids = torch.randint(0, 30, (2, 7))
        mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
        model = get_peft_model(copy.deepcopy(plain), RandLoraConfig(r=2, target_modules=["embed_positions"])).eval()
        randomise(model)
        positions = plain.model.decoder.embed_positions
        assert isinstance(positions, OPTLearnedPositionalEmbedding)
        layer = model.base_model.model.model.decoder.embed_positions
        positions.weight.data += layer.get_delta_weight("default")
        expected = plain(ids, attention_mask=mask).logits.detach()
        assert_close(model(ids, attention_mask=mask).logits.detach(), expected, 1e-5)
        model.merge_adapter()
        assert_close(model(ids, attention_mask=mask).logits.detach(), expected, 1e-5)

    def test_rows_that_are_normalised(self):
        torch.manual_seed(0)
        base, ids = Normed(9, 5), torch.randint(0, 9, (2, 4))
        model = adapted(base)
        layer = model.base_model.model[0]
        table = (base.weight + layer.get_delta_weight("default")).detach().double()
        expected = F.layer_norm(table[ids], (5,))
        y = model(ids)
        assert_close(y.detach(), expected, 1e-5)
        y.square().sum().backward()
        assert layer.randlora_gamma["default"].grad is not None
        model.merge_adapter()
        assert_close(model(ids).detach(), expected, 1e-5)

    def test_scaled_rows_are_merged(self):
        torch.manual_seed(0)
        model = adapted(BartScaledWordEmbedding(9, 5, padding_idx=1, embed_scale=2.5))
        ids = torch.randint(0, 9, (2, 4))
        layer = model.base_model.model[0]
        table = (layer.get_base_layer().weight + layer.get_delta_weight("default")).detach().double()
        assert_close(model(ids).detach(), 2.5 * table[ids], 1e-5)
        model.merge_adapter()
        assert_close(model(ids).detach(), 2.5 * table[ids], 1e-5)


def test_a_compiled_layer_calls_what_was_replaced():
    base, x = made("linear")
    by_attribute(base, None)
    expected = base(x).detach()
    torch._dynamo.reset()
    compiled = torch.compile(adapted(base, trained=False), backend="aot_eager")
    assert_close(compiled(x).detach(), expected, 1e-6)
