"""Linear layers: the contract of all kinds, plans, and the same numbers as PEFT."""

import gc
import itertools
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from randlora import Linear
from randlora.ops import naive
from randlora.ops import plan as plans
from randlora.ops.bases import get_basis
from randlora.ops.bases.dense import DenseBases
from randlora.ops.bases.ternary import SparseBases
from randlora.ops.plan import Plan, force

from ..contract import RANK, SCALING, Contract
from ..helpers import assert_close, conv1d, ours, randomise, theirs

WAYS = ("token", "weight", "fused")
PLANS = [Plan(*ways) for ways in itertools.product(WAYS, WAYS, WAYS[:2])]
INEXACT = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class LayerContract(Contract):
    """A subclass says which base layer it is about."""

    kind = Linear
    in_features: int
    out_features: int
    config: dict = {}  # noqa: RUF012

    def make_base(self) -> nn.Module:
        raise NotImplementedError

    def weight_of(self, base: nn.Module) -> torch.Tensor:
        """The base weight as (out, in)."""
        raise NotImplementedError

    @property
    def shape(self):
        return self.out_features, self.in_features

    def input(self, dtype=torch.float32, batch=(5,)):
        generator = torch.Generator().manual_seed(2)
        return torch.randn(*batch, self.in_features, generator=generator, dtype=torch.float64).to(dtype)

    def matrix(self, layer, adapter="default"):
        """ΔW as (out, in) in float64, by the plain formula."""
        A, B = layer.randlora_A[adapter], layer.randlora_B[adapter]
        lam, gamma = layer.randlora_lambda[adapter].detach(), layer.randlora_gamma[adapter].detach()
        A, B = A.squeeze(1).double(), B.flatten(1).double()
        scaling = layer.scaling[adapter]
        return naive.delta_weight(A, B, lam.double(), gamma.double(), scaling, self.out_features, self.in_features)

    def base_output(self, layer, x):
        return layer.get_base_layer()(x)

    def test_without_init_weights_it_starts_elsewhere(self):
        torch.manual_seed(0)
        layer = ours(nn.Sequential(self.make_base()), r=RANK, target_modules=["0"], init_weights=False).model[0]
        assert layer.randlora_lambda["default"].all()
        x = self.input()
        assert not torch.allclose(layer(x), self.base_output(layer, x))

    # the update

    def test_delta_weight_of_half_precision_parameters_is_formed_in_float32(self):
        layer = self.layer(torch.bfloat16)
        for parameters in (layer.randlora_lambda, layer.randlora_gamma):
            parameters["default"].data = parameters["default"].data.bfloat16()
        update = layer.get_delta_weight("default")
        assert update.dtype == torch.float32
        expected = self.matrix(layer)
        expected = expected if update.shape == expected.shape and not self.config else expected.T
        assert_close(update.detach(), expected, 1e-2)
        assert {factor.dtype for factor in layer.get_scaled_bases("default")} == {torch.float32}

    def test_delta_weight_and_scaled_bases_are_those_of_peft(self):
        mine = self.model(dtype=torch.float64)
        torch.manual_seed(0)
        base = nn.Sequential(self.make_base())
        peft = theirs(base, r=RANK, randlora_alpha=SCALING * RANK, target_modules=["0"], **self.config)
        peft = randomise(peft.double()).model[0]
        mine = randomise(mine.double()).model[0]
        found, expected = mine.get_scaled_bases("default"), peft.get_scaled_bases("default")
        for first, second in zip(found, expected, strict=True):
            assert_close(first.detach(), second.detach(), 1e-10)
        assert_close(mine.get_delta_weight("default").detach(), peft.get_delta_weight("default").detach(), 1e-10)

    def test_scaled_bases_are_applied_in_their_order(self):
        layer = self.layer()
        first, second = layer.get_scaled_bases("default")
        x = self.input()
        update = F.linear(F.linear(x, first), second) * layer.scaling["default"]
        assert_close(update.detach(), x.double() @ self.matrix(layer).T, 1e-5)

    # forward and backward

    @pytest.mark.parametrize("plan", PLANS, ids=str)
    @pytest.mark.parametrize("dtype", list(INEXACT), ids=str)
    def test_output(self, plan, dtype):
        layer, x = self.layer(dtype), self.input(dtype)
        with force(plan):
            y = layer(x)
        assert y.dtype == dtype
        assert_close(y.detach(), self.expected(layer, x), INEXACT[dtype])

    @pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 3, 4), (0,), (2, 0)], ids=str)
    def test_input_shapes(self, batch):
        layer, x = self.layer(), self.input(batch=batch)
        y = layer(x)
        assert y.shape == (*batch, self.out_features)
        torch.testing.assert_close(y.double(), self.expected(layer, x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("plan", PLANS, ids=str)
    def test_gradients(self, plan):
        layer, x = self.layer(torch.float64).double(), self.input(torch.float64).requires_grad_()
        grad = torch.randn(5, self.out_features, dtype=torch.float64)
        with force(plan):
            layer(x).backward(grad)
        found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        assert set(found) == {"randlora_lambda.default", "randlora_gamma.default"}

        lam, gamma = (
            p["default"].detach().clone().requires_grad_() for p in (layer.randlora_lambda, layer.randlora_gamma)
        )
        A, B = layer.randlora_A["default"].squeeze(1).double(), layer.randlora_B["default"].flatten(1).double()
        update = naive.delta_weight(A, B, lam, gamma, SCALING, self.out_features, self.in_features)
        x2 = x.detach().clone().requires_grad_()
        F.linear(x2, self.weight_of(layer.get_base_layer()).detach() + update).backward(grad)
        assert_close(found["randlora_lambda.default"], lam.grad, 1e-10)
        assert_close(found["randlora_gamma.default"], gamma.grad, 1e-10)
        assert_close(x.grad, x2.grad, 1e-10)

    def test_a_trainable_base_weight_gets_its_gradient(self):
        layer, x = self.layer(), self.input()
        base = layer.get_base_layer()
        base.weight.requires_grad_()
        layer(x).sum().backward()
        expected = torch.ones(5, self.out_features).T @ x
        assert_close(self.weight_of_grad(base), expected, 1e-5)

    def weight_of_grad(self, base):
        return base.weight.grad

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast(self, dtype):
        layer, x = self.layer(dtype), self.input()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x if dtype == torch.float32 else x.to(dtype))
        assert y.dtype == torch.bfloat16
        assert_close(y.detach(), self.expected(layer, x), 3e-2)
        y.float().sum().backward()
        assert layer.randlora_lambda["default"].grad.dtype == torch.float32
        assert layer.randlora_lambda["default"].grad.abs().sum() > 0

    def test_dropout_drops_the_adapters_input_alone(self):
        layer, x = self.layer(randlora_dropout=0.5), self.input()
        layer.train()
        torch.manual_seed(7)
        y = layer(x)
        torch.manual_seed(7)
        dropped = F.dropout(x, 0.5)
        expected = self.base_output(layer, x).double() + dropped.double() @ self.matrix(layer).T
        assert_close(y.detach(), expected, 1e-5)
        layer.eval()
        assert_close(layer(x).detach(), self.expected(layer, x), 1e-5)

    @pytest.mark.parametrize("plan", [Plan("token", "token", "token"), Plan("fused", "fused", "weight")], ids=str)
    def test_dropout_is_never_fused(self, plan):
        layer, x = self.layer(randlora_dropout=0.5).train(), self.input()
        torch.manual_seed(7)
        with force(plan):
            y = layer(x)
        torch.manual_seed(7)
        expected = self.base_output(layer, x).double() + F.dropout(x, 0.5).double() @ self.matrix(layer).T
        assert_close(y.detach(), expected, 1e-5)

    @pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
    def test_hooks_of_the_base_layer_run(self, kind):
        layer, x = self.layer(), self.input()
        called, expected = [], self.expected(layer, x)
        getattr(layer.get_base_layer(), kind)(lambda *args: called.append(kind))
        assert_close(layer(x).detach(), expected, 1e-5)
        assert called == [kind]

    @pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
    def test_backward_hooks_of_the_base_layer_run(self, kind):
        layer, x = self.layer(), self.input().requires_grad_()
        called = []
        getattr(layer.get_base_layer(), kind)(lambda *args: called.append(kind))
        layer(x).sum().backward()
        assert called == [kind]

    def test_a_base_layer_of_another_class_computes_its_own_output(self):
        layer, x = self.layer(), self.input()
        base = layer.get_base_layer()
        before = self.expected(layer, x)

        class Shifted(type(base)):
            def forward(self, x):
                return super().forward(x) + 1

        base.__class__ = Shifted
        assert_close(layer(x).detach(), before + 1, 1e-5)

    def test_a_wrong_input_dtype_is_as_wrong_as_for_the_base_layer(self):
        layer = self.layer()
        with pytest.raises(RuntimeError, match="dtype"):
            self.base_output(layer, self.input(torch.float64))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(self.input(torch.float64))

    # several adapters

    # merging

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_several_merged_adapters(self, dtype):
        model = self.two().to(dtype)
        layer, x = model.model[0], self.input(dtype)
        original = layer.get_base_layer().weight.detach().clone()
        expected = self.expected(layer, x, "default", "other")
        layer.merge(adapter_names=["default"])
        with pytest.warns(UserWarning, match="additionally merging other"):
            layer.merge(adapter_names=["other"])
        assert layer.merged_adapters == ["default", "other"]
        assert_close(layer(x).detach(), expected, INEXACT[dtype])
        layer.unmerge()
        assert torch.equal(layer.get_base_layer().weight, original)

    def test_merged_weight_is_rounded_once(self):
        layer = self.layer(torch.bfloat16)
        base = layer.get_base_layer()
        expected = (base.weight.detach().float() + layer.get_delta_weight("default").detach()).bfloat16()
        layer.merge()
        assert torch.equal(base.weight, expected)

    def test_merging_twice_merges_once(self):
        layer, x = self.layer(), self.input()
        layer.merge()
        once = layer(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge()
        assert torch.equal(layer(x), once)

    def test_unmerging_what_is_not_merged_warns(self):
        layer = self.layer()
        original = layer.get_base_layer().weight.detach().clone()
        with pytest.warns(UserWarning, match="Already unmerged"):
            layer.unmerge()
        assert torch.equal(layer.get_base_layer().weight, original)


class LinearContract(LayerContract):
    def make_base(self):
        return nn.Linear(self.in_features, self.out_features)

    def weight_of(self, base):
        return base.weight


class Conv1DContract(LayerContract):
    config = {"fan_in_fan_out": True}  # noqa: RUF012

    def make_base(self):
        return conv1d(self.in_features, self.out_features)

    def to_layout(self, update):
        return update.T

    def weight_of(self, base):
        return base.weight.T

    def weight_of_grad(self, base):
        return base.weight.grad.T

    def test_a_wrong_input_dtype_is_as_wrong_as_for_the_base_layer(self):
        with pytest.raises(RuntimeError):
            self.layer()(self.input(torch.float64))


class TestTallLinear(LinearContract):
    in_features, out_features = 9, 14


class TestWideLinear(LinearContract):
    in_features, out_features = 14, 9


class TestSquareLinear(LinearContract):
    in_features, out_features = 10, 10


class TestLinearWithoutBias(LinearContract):
    in_features, out_features = 9, 14

    def make_base(self):
        return nn.Linear(self.in_features, self.out_features, bias=False)


class TestTallConv1D(Conv1DContract):
    in_features, out_features = 9, 14


class TestWideConv1D(Conv1DContract):
    in_features, out_features = 14, 9


class TestSquareConv1D(Conv1DContract):
    in_features, out_features = 10, 10


def test_many_tokens_in_half_precision_compute_as_few_do():
    """Very sparse bases take another form of product beyond a number of tokens."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 40))
    model = randomise(ours(base.bfloat16(), r=4, randlora_alpha=8, sparsity=32.0, target_modules=["0"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    x, dy = torch.randn(600, 48).bfloat16(), torch.randn(600, 40).bfloat16()
    whole = model(x)
    expected = torch.autograd.grad(whole, parameters, dy)
    blocks = [model(block) for block in x.split(200)]
    gradients = [torch.autograd.grad(y, parameters, part) for y, part in zip(blocks, dy.split(200), strict=True)]
    assert_close(torch.cat(blocks).detach(), whole.detach(), 1e-2)
    for own, parts in zip(expected, zip(*gradients, strict=True), strict=True):
        assert_close(sum(parts), own, 2e-2)
    layer = model.model[0]
    forms = [type(layer._operands("default", x.device, x.dtype, tokens)) for tokens in (200, 600)]
    assert forms == [SparseBases, DenseBases]


class TestPreparedCalls:
    """What is looked up serves only while it would be made in the same way."""

    def layer(self):
        model = randomise(ours(nn.Sequential(nn.Linear(24, 40)), r=4, randlora_alpha=8, target_modules=["0"]))
        return model.model[0]

    def expected(self, layer, x):
        return layer.base_layer(x) + x @ layer.get_delta_weight("default").T

    def test_other_bases_are_seen_and_the_old_ones_freed(self):
        layer, x = self.layer(), torch.randn(5, 24)
        layer(x)
        basis = layer.basis("default")
        spec, gone = basis.spec, weakref.ref(basis)
        del basis
        layer.bind_basis("default", get_basis(replace(spec, key=spec.key + 1)))
        gc.collect()
        assert gone() is None
        assert_close(layer(x).detach(), self.expected(layer, x).detach(), 1e-5)

    def test_a_basis_that_is_put_there_is_seen_too(self):
        """``bases`` is a plain dictionary."""
        layer, x = self.layer(), torch.randn(5, 24)
        layer(x)
        layer.bases["default"] = get_basis(replace(layer.basis("default").spec, key=99))
        assert_close(layer(x).detach(), self.expected(layer, x).detach(), 1e-5)

    def test_settings_of_the_process_are_seen(self):
        layer, x = self.layer(), torch.randn(5, 24)
        layer(x)
        for plan in (Plan("fused", "fused", "weight"), Plan("token", "token", "token")):
            with force(plan):
                layer(x)
                assert layer._prepared_call("default", x, layer.base_layer.weight).plan == plan
        first, before = layer._prepared_call("default", x, layer.base_layer.weight), plans.rates
        assert layer._prepared_call("default", x, layer.base_layer.weight) is first
        gpu = plans.gpu_rates
        try:
            plans.set_rates(plans.Rates(element=0.0))
            second = layer._prepared_call("default", x, layer.base_layer.weight)
            assert second is not first
            plans.set_rates(plans.Rates(element=0.0), "cuda")
            assert layer._prepared_call("default", x, layer.base_layer.weight) is not second
        finally:
            plans.set_rates(before)
            plans.set_rates(gpu, "cuda")

    def test_they_are_bounded(self):
        layer = self.layer().eval()
        with torch.no_grad():
            for tokens in range(600):
                layer(torch.zeros(tokens, 24))
        assert len(layer._prepared._calls) <= 256
