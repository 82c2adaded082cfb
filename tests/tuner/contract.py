"""What every kind of adapted layer does: one contract, inherited by the tests of each kind."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

from randlora import MergeError, PeftModel, RandLoraConfig, RandLoraLayer, get_peft_model
from randlora.ops import naive

from .helpers import assert_close, assert_same_tensors, layers_of, ours, randomise

RANK = 4
SCALING = 6.0 / RANK
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Contract:
    """A subclass makes the base layer and an input, and says where its weight is.

    Attributes:
        kind: class of the adapted layer.
        shape: (out, in) of the weight as a matrix.
        parameter: name of the weight in the base layer.
        targets: what the config targets in ``nn.Sequential(base)``.
        dtypes: in which the base layer runs.
        judge: dtype in which gradients are compared, the widest that the kind runs in.
        requantises: whether merging rounds, and says so.
        code_tolerance: for quantised weights, where a code on the edge may go either way with the last bit of a sum.
    """

    kind: type
    shape: tuple[int, int]
    parameter = "weight"
    targets: dict = {"target_modules": ["0"]}  # noqa: RUF012
    dtypes = tuple(TOLERANCE)
    judge = torch.float64
    requantises = False
    code_tolerance = 0.0

    def make_base(self) -> nn.Module:
        raise NotImplementedError

    def input(self, dtype=torch.float32):
        raise NotImplementedError

    def to_layout(self, update):
        """ΔW (out, in) as the base layer stores its weight."""
        return update

    def weight(self, base):
        """The frozen weight as plain numbers."""
        return getattr(base, self.parameter).detach()

    def apply(self, base, x, weight):
        """The base layer's output in float64 with ``weight`` in the place of its own."""
        return functional_call(copy.deepcopy(base).double(), {self.parameter: weight}, (_double(x),))

    # the layer, and what it must be equal to

    def wrapped(self, dtype=torch.float32):
        torch.manual_seed(0)
        return nn.Sequential(self.make_base()).to(dtype)

    def model(self, dtype=torch.float32, **config):
        values = {"r": RANK, "randlora_alpha": SCALING * RANK, **self.targets, **config}
        model = ours(self.wrapped(dtype), **values)
        return randomise(model.double() if dtype == torch.float64 else model)

    def layer(self, dtype=torch.float32, **config):
        return self.model(dtype, **config).model[0]

    def two(self, dtype=torch.float32):
        model = self.model(dtype)
        model.peft_config["other"] = RandLoraConfig(
            r=3, randlora_alpha=5, projection_prng_key=9, sparse=True, **self.targets
        )
        model.inject_adapter(model.model, "other")
        return randomise(model, "other", seed=8)

    def formula(self, layer, adapter, lam, gamma):
        """ΔW in the layout of the weight, in float64."""
        A, B = layer.randlora_A[adapter].squeeze(1).double(), layer.randlora_B[adapter].flatten(1).double()
        return self.to_layout(naive.delta_weight(A, B, lam, gamma, layer.scaling[adapter], *self.shape))

    def update(self, layer, adapter="default"):
        parameters = (layer.randlora_lambda[adapter], layer.randlora_gamma[adapter])
        return self.formula(layer, adapter, *(p.detach().double() for p in parameters))

    def expected(self, layer, x, *adapters):
        base = layer.get_base_layer()
        total = self.weight(base).double() + sum(self.update(layer, name) for name in adapters or ("default",))
        return self.apply(base, x, total).detach()

    def assert_output(self, found, expected, dtype, message=""):
        assert_close(found.detach(), expected, TOLERANCE[dtype], message)

    def snapshot(self, layer):
        """Copies of all its tensors, as plain ones."""
        return copy.deepcopy(dict(layer.state_dict()))

    def quietly(self, merge, *args, **kwargs):
        """Merges, with the warning that is due and no other."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merge(*args, **kwargs)
        rounding = [str(w.message) for w in caught if "quantising the sum again" in str(w.message)]
        assert len(rounding) == self.requantises, caught

    # state

    def test_kind_and_names(self):
        layer = self.layer()
        assert type(layer) is self.kind
        assert isinstance(layer, RandLoraLayer)
        assert (layer.out_features, layer.in_features) == self.shape
        m = min(self.shape)
        n = -(-m // RANK)
        assert layer.r == {"default": RANK}
        assert layer.scaling == {"default": SCALING}
        assert layer.randlora_lambda["default"].shape[-2:] == (RANK, n)
        assert layer.randlora_gamma["default"].shape[-2:] == (n, m)
        assert {p["default"].dtype for p in (layer.randlora_lambda, layer.randlora_gamma)} == {torch.float32}
        assert repr(layer).startswith(f"randlora.{self.kind.__name__}(")

    def test_the_base_layer_is_frozen_and_the_adapter_trains(self):
        layer = self.layer()
        trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
        assert trained == {"randlora_lambda.default", "randlora_gamma.default"}

    def test_bases_are_no_part_of_the_module_tree(self):
        names = {name for name in self.layer().state_dict() if not name.startswith("base_layer")}
        assert names == {"randlora_lambda.default", "randlora_gamma.default"}

    def test_starts_as_the_base_layer(self):
        torch.manual_seed(0)
        layer = ours(self.wrapped(), r=RANK, **self.targets).model[0]
        n, m = layer.randlora_gamma["default"].shape[-2:]
        assert not layer.randlora_lambda["default"].any()
        gamma = layer.randlora_gamma["default"]
        assert torch.equal(gamma, torch.full_like(gamma, 1 / max(n, m)))
        x = self.input()
        assert torch.equal(layer(x), layer.get_base_layer()(x))

    # the update

    def test_delta_weight_is_the_formula_in_the_layout_of_the_weight(self):
        layer = self.layer()
        update = layer.get_delta_weight("default")
        assert update.shape == self.weight(layer.get_base_layer()).shape
        assert update.dtype == torch.float32
        assert_close(update.detach(), self.update(layer), 1e-6)

    def test_output(self):
        for dtype in self.dtypes:
            layer, x = self.layer(dtype), self.input(dtype)
            y = layer(x)
            assert y.dtype == layer.get_base_layer()(x).dtype
            self.assert_output(y, self.expected(layer, x), dtype, str(dtype))

    @pytest.mark.parametrize("rank", [1, 3, 64])
    def test_ranks_that_do_not_divide_or_exceed_the_dimensions(self, rank):
        layer, x = self.layer(r=rank), self.input()
        assert layer.randlora_lambda["default"].shape[-2:] == (rank, -(-min(self.shape) // rank))
        self.assert_output(layer(x), self.expected(layer, x), torch.float32)

    def test_gradients(self):
        layer, x = self.layer(self.judge), self.input(self.judge)
        by_x = x.is_floating_point()
        y = layer(x.requires_grad_() if by_x else x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        y.backward(grad.to(y.dtype))
        found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        assert set(found) == {"randlora_lambda.default", "randlora_gamma.default"}

        lam, gamma = (
            p["default"].detach().double().requires_grad_() for p in (layer.randlora_lambda, layer.randlora_gamma)
        )
        twin = x.detach().double().requires_grad_() if by_x else x
        weight = self.weight(layer.get_base_layer()).double() + self.formula(layer, "default", lam, gamma)
        self.apply(layer.get_base_layer(), twin, weight).backward(grad)
        tolerance = TOLERANCE[self.judge]
        assert_close(found["randlora_lambda.default"], lam.grad, tolerance, "lambda")
        assert_close(found["randlora_gamma.default"], gamma.grad, tolerance, "gamma")
        if by_x:
            self.assert_output(x.grad, twin.grad, self.judge, "x")

    def test_autocast(self):
        layer, x = self.layer(), self.input()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype == layer.get_base_layer()(x).dtype
        assert_close(y.detach(), self.expected(layer, x), 3e-2)
        y.float().square().sum().backward()
        assert layer.randlora_lambda["default"].grad.dtype == torch.float32
        assert layer.randlora_lambda["default"].grad.abs().sum() > 0

    def test_compiled(self):
        layer, x = self.layer(), self.input()
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager")
        assert_close(compiled(x).detach(), layer(x).detach(), 1e-5)

    # several adapters

    def test_several_active_adapters_add_up(self):
        layer, x = self.two().model[0], self.input()
        for active in (["default"], ["other"], ["default", "other"]):
            layer.set_adapter(active)
            self.assert_output(layer(x), self.expected(layer, x, *active), torch.float32, str(active))

    def test_deleted_adapter_leaves_the_other(self):
        layer, x = self.two().model[0], self.input()
        layer.set_adapter("other")
        expected = layer(x)
        layer.delete_adapter("default")
        assert torch.equal(layer(x), expected)
        for held in (layer.r, layer.scaling, layer.bases, layer.randlora_lambda, layer.randlora_gamma):
            assert list(held) == ["other"]

    def test_disabled_adapters_leave_the_base_layer(self):
        layer, x = self.layer(), self.input()
        adapted = layer(x)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.get_base_layer()(x))
        layer.enable_adapters(True)
        assert torch.equal(layer(x), adapted)

    # merging

    @pytest.mark.parametrize("safe", [True, False])
    def test_merge_and_bit_exact_unmerge(self, safe):
        for dtype in self.dtypes:
            layer, x = self.layer(dtype), self.input(dtype)
            base = layer.get_base_layer()
            output, before = layer(x), self.snapshot(layer)
            expected = self.merged_weight(layer)
            self.quietly(layer.merge, safe_merge=safe)
            assert layer.merged
            merged = self.weight(layer.get_base_layer())
            assert_close(merged, expected, max(self.code_tolerance, TOLERANCE[dtype]), str(dtype))
            by_merged = self.apply(layer.get_base_layer(), x, merged.double()).detach()
            self.assert_output(layer(x), by_merged, dtype, str(dtype))
            layer.unmerge()
            assert not layer.merged
            assert layer.get_base_layer() is base
            assert_same_tensors(self.snapshot(layer), before)
            assert torch.equal(layer(x), output)

    def merged_weight(self, layer, *adapters):
        """W + ΔW, as exactly as the kind can hold it."""
        updates = sum(self.update(layer, name) for name in adapters or ("default",))
        return self.weight(layer.get_base_layer()).double() + updates

    def test_several_merged_adapters(self):
        layer = self.two().model[0]
        before = self.snapshot(layer)
        expected = self.merged_weight(layer, "default", "other")
        self.quietly(layer.merge, adapter_names=["default", "other"])
        assert_close(self.weight(layer.get_base_layer()), expected, max(self.code_tolerance, 1e-5))
        layer.unmerge()
        assert_same_tensors(self.snapshot(layer), before)
        self.quietly(layer.merge, adapter_names=["default"])
        self.quietly(layer.merge, adapter_names=["other"])
        assert layer.merged_adapters == ["default", "other"]
        layer.unmerge()
        assert_same_tensors(self.snapshot(layer), before)

    def test_safe_merge_refuses(self):
        layer = self.layer()
        before = self.snapshot(layer)
        layer.randlora_lambda["default"].data.view(-1)[0] = float("nan")
        with pytest.raises(MergeError, match="default"):
            layer.merge(safe_merge=True)
        assert not layer.merged
        before["randlora_lambda.default"].view(-1)[0] = 0
        layer.randlora_lambda["default"].data.view(-1)[0] = 0
        assert_same_tensors(self.snapshot(layer), before)

    def test_disabling_unmerges(self):
        layer, x = self.layer(), self.input()
        plain = layer.get_base_layer()(x)
        self.quietly(layer.merge)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), plain)
        assert not layer.merged

    def test_merge_and_unload(self):
        model, x = self.model(), self.input()
        kind = type(model.model[0].get_base_layer())
        twin = copy.deepcopy(model.model[0])
        self.quietly(twin.merge)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = model.merge_and_unload(safe_merge=True)
        assert type(merged[0]) is kind
        assert torch.equal(merged(x), twin(x))

    # copies and files

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies_share_the_bases_and_nothing_else(self, duplicate):
        layer, x = self.layer(), self.input()
        expected = layer(x)
        twin = duplicate(layer)
        layer.randlora_lambda["default"].data.zero_()
        assert torch.equal(twin(x), expected)
        assert twin.bases["default"] is layer.bases["default"]

    def test_a_copy_of_a_merged_layer_unmerges_exactly(self):
        layer = self.layer()
        before = self.snapshot(layer)
        self.quietly(layer.merge)
        twin = copy.deepcopy(layer)
        layer.unmerge()
        twin.unmerge()
        assert_same_tensors(self.snapshot(layer), before)
        assert_same_tensors(self.snapshot(twin), before)

    def test_state_dict_round_trip(self):
        model, x = self.model(), self.input()
        other = randomise(self.model(), seed=17)
        assert not torch.equal(other.model(x), model.model(x))
        file = io.BytesIO()
        torch.save(self.loadable(model.state_dict()), file)
        file.seek(0)
        whole = len(self.loadable(model.state_dict())) == len(model.state_dict())
        other.load_state_dict(torch.load(file), strict=whole)
        assert torch.equal(other.model(x), model.model(x))

    def loadable(self, state):
        """What ``load_state_dict`` of the base layer takes."""
        return state

    @pytest.mark.parametrize("save_projection", [True, False])
    @pytest.mark.parametrize("scaling", ["peft", "paper"])
    def test_save_and_load(self, save_projection, scaling, tmp_path):
        config = RandLoraConfig(
            r=RANK, randlora_alpha=6, save_projection=save_projection, randlora_scaling=scaling, **self.targets
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is larger than the smaller dimension")
            model = randomise(get_peft_model(self.wrapped(), config))
            model.eval().save_pretrained(tmp_path)
            again = PeftModel.from_pretrained(self.wrapped(), tmp_path)
        assert [type(layer) for layer in layers_of(again).values()] == [
            type(layer) for layer in layers_of(model).values()
        ]
        torch.testing.assert_close(again(self.input()), model(self.input()), rtol=1e-5, atol=1e-5)


def _double(x):
    return x.double() if x.is_floating_point() else x
