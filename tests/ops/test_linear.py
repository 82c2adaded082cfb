"""Every plan of the adapted layer against the plain formula: outputs, each gradient by name, and what is kept."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from randlora.ops import bf16, naive
from randlora.ops.bases import BasisSpec, Structured, dense
from randlora.ops.bases.dense import DenseBases
from randlora.ops.bases.ternary import sparse_bases
from randlora.ops.codes import pack
from randlora.ops.linear import adapted_linear, can_fuse, delta_weight, with_update
from randlora.ops.operands import Sizes
from randlora.ops.plan import Plan, force
from randlora.ops.units import in_units

WAYS = ("token", "weight", "fused")
# Output and gradients are computed apart, so that each way of the output and each pair of the gradients' is enough.
PLANS = [Plan(o, *ways) for o, ways in zip(WAYS * 2, itertools.product(WAYS, WAYS[:2]), strict=True)]
UNIFORM = [Plan("token", "token", "token"), Plan("weight", "weight", "weight"), Plan("fused", "fused", "weight")]
KINDS = ("dense", "split", "codes", "sparse", "structured")
SCALING = 1.7


def plan_name(plan):
    return "-".join((plan.output, plan.grad_input, plan.grad_basis)) if isinstance(plan, Plan) else str(plan)


class Case:
    """Random values for a layer of the given sizes, drawn in float64 and rounded to ``dtype``.

    ``kind`` says how the layer holds its bases; ``A`` and ``B`` are their numbers in any case.
    """

    def __init__(
        self, out, in_, rank, batch=(5,), dtype=torch.float64, *, weight=True, bias=True, seed=0, kind="dense"
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        n, m, M = -(-min(out, in_) // rank), min(out, in_), max(out, in_)
        parameter_dtype = torch.promote_types(dtype, torch.float32)
        self.out, self.in_, self.dtype = out, in_, dtype
        self.kind = kind
        self.A, self.B = draw(rank, m).to(dtype), (draw(M, n * rank) / (n * rank) ** 0.5).to(dtype)
        if kind == "split":
            self.B = self.B.bfloat16().to(dtype)
        elif kind in ("codes", "sparse"):
            self.A, self.B = (t.sign() * (torch.rand(t.shape, generator=generator) < 0.4) for t in (self.A, self.B))
        elif kind == "structured":
            self.stored = Structured(2).draw(BasisSpec(rank, m, M, seed, Structured(2), m, M))
            A, B = self.stored.tensors(torch.device("cpu"), torch.float64)
            self.A, self.B = (A / self.stored.factors[0]).to(dtype), B.to(dtype)
        self.weight = (draw(out, in_) / in_**0.5).to(dtype) if weight else None
        self.grad = draw(*batch, out).to(dtype)
        self.leaves = {
            "x": draw(*batch, in_).to(dtype),
            "lam": draw(rank, n).to(parameter_dtype),
            "gamma": draw(n, m).to(parameter_dtype),
        }
        if bias:
            self.leaves["bias"] = draw(out).to(parameter_dtype)

    def bases(self):
        """A and B as layers pass them."""
        if self.kind == "sparse":
            wide = torch.promote_types(self.dtype, torch.float32)
            return sparse_bases(self.A.to(wide), self.B.to(wide), self.dtype)
        if self.kind == "structured":
            sizes = Sizes(max(self.out, self.in_), min(self.out, self.in_), self.leaves["lam"].shape[1])
            return self.stored.operands(torch.device("cpu"), self.dtype, sizes, None)
        if self.kind == "codes":
            return DenseBases(self.A.to(torch.int8).unsqueeze(1), pack(self.B.to(torch.int8)), self.dtype)
        B = self.B.bfloat16() if self.kind == "split" else in_units(self.B, self.dtype)
        return DenseBases(self.A.unsqueeze(1), B, self.dtype)

    def run(self, leaves, update=None):
        return adapted_linear(
            leaves["x"],
            self.bases(),
            leaves["lam"],
            leaves["gamma"],
            SCALING,
            self.out,
            self.weight,
            leaves.get("bias") if self.weight is not None else None,
            update,
        )

    def results(self) -> dict[str, torch.Tensor]:
        """Output and every gradient by name."""
        leaves = {name: value.detach().clone().requires_grad_() for name, value in self.leaves.items()}
        y = self.run(leaves)
        y.backward(self.grad)
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def expected(self) -> dict[str, torch.Tensor]:
        """The same from the plain formula in float64, differentiated by autograd."""
        leaves = {name: value.detach().double().clone().requires_grad_() for name, value in self.leaves.items()}
        update = naive.delta_weight(
            self.A.double(), self.B.double(), leaves["lam"], leaves["gamma"], SCALING, self.out, self.in_
        )
        weight = torch.zeros_like(update) if self.weight is None else self.weight.double()
        y = naive.linear(leaves["x"], weight, leaves.get("bias") if self.weight is not None else None, update)
        y.backward(self.grad.double())
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def magnitudes(self) -> dict[str, torch.Tensor]:
        """What is summed to each result, without the signs: what a rounding error is to be measured by."""
        case = copy.copy(self)
        case.A, case.B, case.grad = self.A.abs(), self.B.abs(), self.grad.abs()
        case.weight = None if self.weight is None else self.weight.abs()
        case.leaves = {name: value.detach().abs() for name, value in self.leaves.items()}
        return case.expected()

    def check(self, tolerance):
        """Relative errors below ``tolerance``, or, where terms cancel, within some roundings of the terms."""
        found, expected, magnitudes = self.results(), self.expected(), self.magnitudes()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            dtype = self.dtype if name in ("y", "x") else self.leaves[name].dtype
            assert found[name].dtype == dtype, name
            assert found[name].shape == value.shape, name
            error = (found[name].double() - value).norm()
            roundings = 4 * torch.finfo(self.dtype).eps * magnitudes[name].norm()
            limit = max(tolerance * value.norm(), roundings)
            assert error <= limit, f"{name}: relative error {error / value.norm():.2e}"


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Relative, per tensor: the demands of the project for 64 and 32 bits, about ten half-ulps for 16."""

dims = st.integers(1, 20)
batches = st.sampled_from([(), (1,), (7,), (40,), (2, 3), (2, 1, 4), (0,), (3, 0)])


class TestAgainstThePlainFormula:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("plan", PLANS, ids=plan_name)
    @settings(deadline=None, max_examples=25)
    @given(
        out=dims,
        in_=dims,
        rank=st.integers(1, 25),
        batch=batches,
        dtype=st.sampled_from([torch.float64, torch.float32]),
        weight=st.booleans(),
        bias=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_every_plan(self, kind, plan, out, in_, rank, batch, dtype, weight, bias, seed):
        if kind == "split":
            dtype = torch.float32
        case = Case(out, in_, rank, batch, dtype, weight=weight, bias=bias, seed=seed, kind=kind)
        with force(plan):
            case.check(TOLERANCE[dtype])

    @settings(deadline=None)
    @given(out=dims, in_=dims, rank=st.integers(1, 25), batch=batches, bias=st.booleans(), seed=st.integers(0, 1000))
    def test_the_chosen_plan(self, out, in_, rank, batch, bias, seed):
        Case(out, in_, rank, batch, torch.float64, bias=bias, seed=seed).check(1e-10)

    @pytest.mark.parametrize("plan", UNIFORM, ids=plan_name)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("out", "in_"), [(48, 32), (32, 48), (40, 40)], ids=["tall", "wide", "square"])
    @pytest.mark.parametrize("weight", [True, False])
    @pytest.mark.parametrize("kind", ["dense", "codes", "sparse", "structured"])
    def test_half_precision_against_float64(self, plan, dtype, out, in_, weight, kind):
        with force(plan):
            Case(out, in_, 6, (4, 9), dtype, weight=weight, kind=kind).check(TOLERANCE[dtype])

    @pytest.mark.parametrize("plan", UNIFORM, ids=plan_name)
    def test_a_small_update_survives_a_bf16_weight(self, plan):
        """ΔW far below half an ulp of W: formed in bf16, W + ΔW would be W."""
        case = Case(64, 64, 8, (1,), torch.bfloat16, bias=False)
        case.leaves["lam"] *= 2e-5
        one = {"lam": torch.zeros_like(case.leaves["lam"])}
        with force(plan):
            frozen = case.run(case.leaves | one)
            # The output is bf16 as well, so look at the update where the base's product is zero.
            case.weight = torch.full_like(case.weight, 1.0)
            case.leaves["x"] = torch.zeros_like(case.leaves["x"])
            case.leaves["x"][0, 0], case.leaves["x"][0, 1] = 1.0, -1.0
            y = case.run(case.leaves)
        update = naive.delta_weight(
            case.A.double(),
            case.B.double(),
            case.leaves["lam"].double(),
            case.leaves["gamma"].double(),
            SCALING,
            64,
            64,
        )
        expected = case.leaves["x"].double() @ update.T
        assert expected.abs().max() < 2**-9
        assert (y.double() - expected).norm() <= 0.04 * expected.norm()
        assert frozen.isfinite().all()

    @pytest.mark.parametrize("plan", PLANS, ids=plan_name)
    @pytest.mark.parametrize(("out", "in_"), [(9, 6), (6, 9)], ids=["tall", "wide"])
    def test_input_without_gradient(self, plan, out, in_):
        case = Case(out, in_, 4)
        expected = case.expected()
        leaves = {name: value.detach().clone().requires_grad_(name != "x") for name, value in case.leaves.items()}
        with force(plan):
            case.run(leaves).backward(case.grad)
        assert leaves["x"].grad is None
        for name in ("lam", "gamma", "bias"):
            torch.testing.assert_close(leaves[name].grad, expected[name], rtol=1e-10, atol=1e-10)

    def test_transposed_and_sliced_operands(self):
        """Views, as the layers pass them: cut bases, a transposed weight (Conv1D), a strided input."""
        case = Case(9, 6, 4, (5,))
        expected = case.expected()
        case.A = torch.cat([case.A, case.A], dim=1)[:, :6]
        case.B = torch.cat([case.B, case.B], dim=1)[:, :8]
        case.weight = case.weight.T.contiguous().T
        case.leaves["x"] = torch.stack([case.leaves["x"]] * 2, dim=-1)[..., 0]
        case.grad = case.grad.T.contiguous().T
        for plan in PLANS:
            with force(plan):
                for name, value in case.results().items():
                    torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)

    def test_bases_and_weight_take_no_gradient(self):
        case = Case(9, 6, 4)
        case.A.requires_grad_()
        case.B.requires_grad_()
        case.results()
        assert case.A.grad is None
        assert case.B.grad is None


class TestPieces:
    @settings(deadline=None)
    @given(
        out=dims,
        in_=dims,
        rank=st.integers(1, 25),
        seed=st.integers(0, 1000),
        kind=st.sampled_from(KINDS),
        base=...,
    )
    def test_delta_weight(self, out: int, in_: int, rank: int, seed: int, kind: str, base: bool):
        case = Case(out, in_, rank, seed=seed, kind=kind, dtype=torch.float32 if kind == "split" else torch.float64)
        lam, gamma = case.leaves["lam"], case.leaves["gamma"]
        expected = naive.delta_weight(case.A, case.B, lam, gamma, SCALING, out, in_)
        weight = case.weight if base else None
        found = delta_weight(case.bases(), lam, gamma, SCALING, wide=out < in_, base=weight)
        tolerance = 1e-4 if kind == "split" else 1e-10
        torch.testing.assert_close(found, expected + (weight if base else 0), rtol=tolerance, atol=tolerance)

    def test_scaled_basis_is_formed_in_the_wider_dtype(self):
        case = Case(9, 6, 4, dtype=torch.bfloat16)
        lam, gamma, bases = case.leaves["lam"], case.leaves["gamma"], case.bases()
        exact = DenseBases(case.A.double().unsqueeze(1), case.B, torch.float64).scaled(lam.double(), gamma.double())
        found = bases._replace(dtype=torch.float32).scaled(lam, gamma)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
        assert bases.scaled(lam, gamma).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("compute", "weight", "expected"),
        [
            (torch.float32, torch.float32, True),
            (torch.float64, torch.float64, True),
            (torch.bfloat16, torch.bfloat16, False),
            (torch.float16, torch.float16, False),
            (torch.bfloat16, torch.float32, False),
            (torch.float32, torch.bfloat16, False),
        ],
    )
    def test_only_wide_weights_are_fused(self, compute, weight, expected):
        assert can_fuse(compute, weight) is expected


SHAPES = pytest.mark.parametrize(("out", "in_", "rank"), [(5, 3, 2), (3, 5, 2), (4, 4, 6)], ids=["tall", "wide", "r>m"])
DOUBLE_KINDS = pytest.mark.parametrize("kind", ["dense", "codes", "sparse", "structured"])


class TestDerivatives:
    @pytest.mark.parametrize("plan", PLANS, ids=plan_name)
    @SHAPES
    @pytest.mark.parametrize("weight", [True, False])
    @DOUBLE_KINDS
    def test_gradcheck(self, plan, out, in_, rank, weight, kind):
        case = Case(out, in_, rank, (3,), weight=weight, bias=weight, kind=kind)
        leaves = {name: value.requires_grad_() for name, value in case.leaves.items()}
        with force(plan):
            assert gradcheck(lambda *values: case.run(dict(zip(leaves, values, strict=True))), tuple(leaves.values()))

    @pytest.mark.parametrize("plan", PLANS, ids=plan_name)
    @SHAPES
    @DOUBLE_KINDS
    def test_gradgradcheck(self, plan, out, in_, rank, kind):
        case = Case(out, in_, rank, (2,), kind=kind)
        leaves = {name: value.requires_grad_() for name, value in case.leaves.items()}
        with force(plan):
            assert gradgradcheck(
                lambda *values: case.run(dict(zip(leaves, values, strict=True))), tuple(leaves.values())
            )

    @pytest.mark.parametrize("plan", PLANS, ids=plan_name)
    @pytest.mark.parametrize(("out", "in_"), [(9, 6), (6, 9)], ids=["tall", "wide"])
    @DOUBLE_KINDS
    def test_functional_grad(self, plan, out, in_, kind):
        case = Case(out, in_, 4, kind=kind)
        with force(plan):
            found = torch.func.grad(lambda leaves: (case.run(leaves) * case.grad).sum())(case.leaves)
        for name, value in found.items():
            torch.testing.assert_close(value, case.expected()[name], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("plan", PLANS, ids=plan_name)
    @pytest.mark.parametrize(("out", "in_"), [(9, 6), (6, 9)], ids=["tall", "wide"])
    @DOUBLE_KINDS
    def test_gradients_per_sample_by_vmap(self, plan, out, in_, kind):
        case = Case(out, in_, 4, (3, 2), kind=kind)
        parameters = {name: value for name, value in case.leaves.items() if name != "x"}

        def loss(parameters, x, grad):
            return (case.run(parameters | {"x": x}) * grad).sum()

        with force(plan):
            found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
                parameters, case.leaves["x"], case.grad
            )
        for index in range(3):
            sample = Case(out, in_, 4, (3, 2), kind=kind)
            sample.leaves["x"], sample.grad = case.leaves["x"][index], case.grad[index]
            for name, value in sample.expected().items():
                if name in found:
                    torch.testing.assert_close(found[name][index], value, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("kind", KINDS)
    def test_vmap_over_models(self, kind):
        case = Case(9, 6, 4, kind=kind, dtype=torch.float32)
        lams = torch.stack([case.leaves["lam"], -case.leaves["lam"]])
        found = torch.func.vmap(lambda lam: case.run(case.leaves | {"lam": lam}))(lams)
        for index in range(2):
            torch.testing.assert_close(found[index], case.run(case.leaves | {"lam": lams[index]}))

    def test_forward_mode_is_refused_in_words(self):
        case = Case(9, 6, 4)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward mode"):
            torch.func.jvp(lambda x: case.run(case.leaves | {"x": x}), (case.leaves["x"],), (case.leaves["x"],))
        x = case.leaves["x"].detach()
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward mode"):
            case.run({name: leaf.detach() for name, leaf in case.leaves.items()} | {"x": forward_ad.make_dual(x, x)})


class Allocations(TorchDispatchMode):
    """Remembers every storage that an operation returns, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes that are still held."""
        return sum(nbytes for storage, nbytes in self.storages.values() if not storage.expired())


@pytest.mark.parametrize("plan", PLANS, ids=plan_name)
@pytest.mark.parametrize(("out", "in_"), [(30, 20), (20, 30)], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestMemory:
    def test_nothing_is_saved_but_what_exists_anyway(self, plan, out, in_, dtype):
        case = Case(out, in_, 4, (16,), dtype)
        leaves = {name: value.requires_grad_() for name, value in case.leaves.items()}
        known = {t.untyped_storage().data_ptr() for t in (*leaves.values(), case.A, case.B, case.weight)}
        saved = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
            force(plan),
        ):
            y = case.run(leaves)
        assert {leaves[name].data_ptr() for name in ("x", "lam", "gamma")} <= {t.data_ptr() for t in saved}
        extra = [tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() not in known]
        assert not extra
        y.backward(case.grad)

    def test_temporaries_die_with_the_call(self, plan, out, in_, dtype):
        case = Case(out, in_, 4, (16,), dtype)
        leaves = {name: value.requires_grad_() for name, value in case.leaves.items()}
        with force(plan), Allocations() as forward:
            y = case.run(leaves)
        assert len(forward.storages) > 1
        inputs = sum(
            t.untyped_storage().nbytes()
            for t in (*leaves.values(), case.A, case.B, case.weight)
            if t.untyped_storage()._cdata in forward.storages
        )
        scaled = case.A.numel() * 4  # A with the scaling in it, in float32, which layers share
        assert forward.alive() - inputs == y.untyped_storage().nbytes() + scaled

        with Allocations() as backward:
            y.backward(case.grad)
        gradients = sum(leaf.grad.untyped_storage().nbytes() for leaf in leaves.values())
        known = {t.untyped_storage()._cdata for t in (*leaves.values(), case.A, case.B, case.weight, case.grad, y)}
        fresh = [s for cdata, s in backward.storages.items() if cdata not in known]
        assert sum(nbytes for storage, nbytes in fresh if not storage.expired()) <= gradients + scaled


class TestCompile:
    @pytest.mark.parametrize("plan", UNIFORM, ids=plan_name)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_graph_without_recompilation(self, plan, kind, dtype):
        torch._dynamo.reset()
        case = Case(9, 6, 4, (5,), dtype, kind=kind)
        bases = case.bases()
        case.bases = lambda: bases
        compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
        with force(plan):
            expected = case.results()
            for step in range(3):
                leaves = {name: value.detach().clone().requires_grad_() for name, value in case.leaves.items()}
                with torch._dynamo.config.patch(error_on_recompile=step > 0):
                    y = compiled(leaves)
                    y.backward(case.grad)
                torch.testing.assert_close(y.detach(), expected["y"])
                for name, leaf in leaves.items():
                    torch.testing.assert_close(leaf.grad, expected[name])

    @pytest.mark.parametrize("kind", ["dense", "structured"])
    def test_one_graph_for_several_numbers_of_tokens(self, kind):
        torch._dynamo.reset()
        case = Case(9, 6, 4, (5,), torch.float32)
        bases = case.bases()
        case.bases = lambda: bases
        compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager", dynamic=True)
        for step, tokens in enumerate((7, 9, 8)):
            leaves = case.leaves | {"x": torch.randn(tokens, 6)}
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                torch.testing.assert_close(compiled(leaves), case.run(leaves))

    @pytest.mark.parametrize("kind", KINDS)
    def test_unforced(self, kind):
        torch._dynamo.reset()
        case = Case(9, 6, 4, (5,), torch.float32, kind=kind)
        bases = case.bases()
        case.bases = lambda: bases
        expected = case.results()
        leaves = {name: value.detach().clone().requires_grad_() for name, value in case.leaves.items()}
        torch.compile(case.run, fullgraph=True, backend="aot_eager")(leaves).backward(case.grad)
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, expected[name])


@pytest.mark.parametrize("plan", PLANS, ids=plan_name)
def test_autocast_around_the_call_changes_nothing(plan):
    """The caller decides the dtype; inside, products run in it."""
    case = Case(9, 6, 4, (5,), torch.float32)
    with force(plan):
        expected = case.results()
        with torch.autocast("cpu", torch.bfloat16):
            found = case.results()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_frozen_layer_where_lambda_is_zero():
    case = Case(9, 6, 4, (5,), torch.float32)
    case.leaves["lam"].zero_()
    expected = nn.functional.linear(case.leaves["x"], case.weight, case.leaves["bias"])
    for plan in PLANS:
        with force(plan):
            assert torch.equal(case.run(case.leaves), expected), plan


def test_an_empty_batch_gives_zero_gradients():
    """Sums over nothing are zero, not whatever the memory held."""
    for plan in PLANS:
        with force(plan):
            results = Case(9, 6, 4, (0,), torch.float32).results()
        assert results["y"].shape == (0, 9)
        for name in ("lam", "gamma", "bias"):
            assert torch.equal(results[name], torch.zeros_like(results[name])), (plan, name)


@pytest.mark.parametrize("plan", UNIFORM, ids=plan_name)
def test_codes_are_split_where_they_are_many(monkeypatch, plan):
    monkeypatch.setattr(bf16, "_SMALLEST", 1)
    with force(plan):
        Case(9, 6, 4, (5,), torch.float32, kind="codes").check(TOLERANCE[torch.float32])


@pytest.mark.parametrize("plan", UNIFORM, ids=plan_name)
def test_gradients_of_scalings_are_summed_over_blocks(monkeypatch, plan):
    monkeypatch.setattr(dense, "_IN_CACHE", 1)
    with force(plan):
        Case(9, 6, 4, (5,), torch.float64).check(TOLERANCE[torch.float64])


@pytest.mark.parametrize("tokens", [5, 70], ids=["two products", "one product with the sum"])
@pytest.mark.parametrize(("out", "in_"), [(9, 6), (6, 9)], ids=["tall", "wide"])
def test_an_update_at_hand_gives_the_same(tokens, out, in_):
    case = Case(out, in_, 4, batch=(tokens,))
    update = naive.delta_weight(case.A, case.B, case.leaves["lam"], case.leaves["gamma"], SCALING, out, in_)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in case.leaves.items()}
    y = case.run(leaves, update)
    y.backward(case.grad)
    expected = case.expected()
    torch.testing.assert_close(y, expected["y"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(with_update(leaves["x"], case.weight, update, leaves["bias"]), y)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-10, atol=1e-10)
