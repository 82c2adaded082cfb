"""The kernels against the same steps by torch, in float64. ``test_triton.py`` runs this file in a process of its own.

On a GPU: ``pytest tests/ops/gpu/triton_cases.py``. Elsewhere with TRITON_INTERPRET=1, which has to be set before
anything imports Triton, in small blocks that divide no dimension here.
"""

import copy
from contextlib import ExitStack

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.pytorch_utils import Conv1D

from randlora import RandLoraConfig, get_peft_model
from randlora.analysis import environment
from randlora.ops import codes, rounding
from randlora.ops.bases import BasisSpec, Structured, get_basis
from randlora.ops.bases.dense import DenseBases
from randlora.ops.gpu import availability, elementwise, gradients, kernels, products
from randlora.ops.gpu.launch import blocks, interpreting, launch
from randlora.ops.linear import adapted_linear
from randlora.ops.operands import Beside, Sizes
from randlora.ops.plan import Plan, force
from randlora.ops.units import in_units, unit

DEVICE = torch.device("cpu" if interpreting else "cuda")
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}

# (tokens, m, M, rank): from few columns to many, ranks that are powers of two and not, of one basis and of many
SIZES = [(7, 45, 50, 4), (33, 39, 70, 6), (1, 33, 35, 20), (37, 70, 41, 32), (3, 20, 67, 64), (35, 37, 40, 256)]
sizes = pytest.mark.parametrize(("T", "m", "M", "r"), SIZES)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
kinds = pytest.mark.parametrize("coded", [False, True], ids=["dense", "codes"])


class Draw:
    """Operands of a layer, on the device; ``coded`` makes the bases ternary, B four numbers to a byte."""

    def __init__(self, T, m, M, r, dtype=torch.bfloat16, coded=False):
        n = -(-m // r)
        self.q, self.dtype, self.coded = n * r, dtype, coded
        self.A = self.basis(r, m + 5)[:, None, :m]  # cut from a wider one, as layers have it
        self.lam, self.gamma = self.random(r, n).float(), self.random(n, m).float()
        self.v, self.u, self.h = self.random(T, m), self.random(T, M), self.random(T, self.q)
        self.B, self.W, self.bias = self.basis(M, self.q), self.random(M, m), self.random(m)
        self.seed = torch.tensor([20261124], dtype=torch.int32, device=DEVICE)

    def random(self, *shape):
        return torch.randn(shape).to(self.dtype).to(DEVICE)

    def basis(self, *shape):
        return torch.randint(-1, 2, shape, dtype=torch.int8, device=DEVICE) if self.coded else self.random(*shape)

    def bases(self):
        return DenseBases(self.A, codes.pack(self.B) if self.coded else in_units(self.B, self.dtype), self.dtype)

    def exact(self):
        """The same bases in float64, which no kernel computes in."""
        return DenseBases(self.A.double(), self.B.double(), torch.float64)


class Launches(TorchDispatchMode):
    """Counts what a device is given to do: kernels of ours, and within the context operations that are no views."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.kernels, self.operations = 0, []
        monkeypatch.setattr(availability, "_is_recorded", torch._C._are_functorch_transforms_active)
        for module in (elementwise, gradients, products):
            monkeypatch.setattr(module, "launch", self._launch)

    def _launch(self, *arguments, **constants):
        self.kernels += 1
        with _disable_current_modes():  # the interpreter computes by operations of torch
            launch(*arguments, **constants)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and "empty" not in func.name() and "unsafe_view" not in func.name():
            self.operations.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return self.kernels + len(self.operations)


def check(found, expected, roundings=2.0):
    """What a kernel gave against float64, in units of the roundings of its dtype."""
    assert found.shape == expected.shape
    found, expected, dtype = found.double().cpu(), expected.cpu(), found.dtype
    error = (found - expected).norm() / expected.norm()
    assert error <= roundings * EPS.get(dtype, 1e-6), f"{error:.1e}"  # dλ and dγ stay in float32


class TestAgainstTheTwins:
    @sizes
    @dtypes
    @kinds
    def test_the_scaled_basis_is_that_of_torch_bit_for_bit(self, T, m, M, r, dtype, coded):
        d = Draw(T, m, M, r, dtype, coded)
        wide = DenseBases(d.A.float(), d.B.float(), torch.float32).scaled(d.lam, d.gamma)
        assert torch.equal(kernels.scaled(d.A, d.lam, d.gamma, dtype), wide.to(dtype))

    @sizes
    @dtypes
    @kinds
    def test_gradients_of_the_scalings(self, T, m, M, r, dtype, coded):
        d = Draw(T, m, M, r, dtype, coded)
        gradient = d.random(m, d.q).T if coded else d.random(d.q, m)  # in either memory order
        expected = d.exact()._gradients(gradient.double(), d.lam.double(), d.gamma.double())
        for found, wanted in zip(
            kernels.scaling_gradients(gradient.unsqueeze(0), d.A, d.lam, d.gamma), expected, strict=True
        ):
            assert found.dtype == torch.float32
            check(found, wanted)

    @pytest.mark.parametrize(("T", "m", "M"), [(3, 45, 50), (40, 48, 40), (3, 64, 32)])
    @dtypes
    def test_structured_bases(self, T, m, M, dtype):
        """Every step, for few tokens and for many, with groups that are even and that are not."""
        m, M, kind = min(m, M), max(m, M), Structured(4)
        n, device = -(-m // 8), torch.device("cpu")
        basis = get_basis(BasisSpec(8, m, M, 0, kind, m, M))
        (mine, exact), d = (
            (basis.operands(DEVICE, dtype, Sizes(M, m, n)), basis.operands(device, torch.float64, Sizes(M, m, n))),
            Draw(T, m, M, 8, dtype),
        )
        assert mine.B.dtype == dtype
        lam, gamma, u, v, W = (t.double().cpu() for t in (d.lam, d.gamma, d.u, d.v, d.W))
        scaled, wide = mine.scaled(d.lam / mine.unit, d.gamma), exact.scaled(lam, gamma)
        check(mine._formed(scaled) * mine.unit, exact._formed(wide))
        check(mine.widen(d.v, scaled, Beside(d.v, d.W.T, None)), exact.widen(v, wide, Beside(v, W.T, None)), 8)
        projected, *found = mine.from_tokens(d.u, d.v, d.lam / mine.unit, d.gamma, scaled)
        expected = exact.from_tokens(u, v, lam, gamma, wide)
        check(mine.narrow(projected, scaled, None), exact.narrow(expected[0], wide, None), 8)
        check((found[0] / mine.unit).to(dtype), expected[1], 8)
        check(found[1].to(dtype), expected[2], 8)

    @sizes
    @dtypes
    def test_a_sum_of_products(self, T, m, M, r, dtype):
        d = Draw(T, m, M, r, dtype)
        u, v, h, W, B = (t.double() for t in (d.u, d.v, d.h, d.W, d.B))
        check(kernels.rounded_sum(d.v, d.W.T, d.h, d.B.T, None), v @ W.T + h @ B.T)
        weight = d.W.T.contiguous().T  # in the other memory order
        check(kernels.rounded_sum(d.u, weight, None, None, d.bias.expand(T, -1)), u @ W + d.bias.double())
        update = torch.randn(T, m, device=DEVICE)
        check(kernels.rounded_sum(d.u, weight, None, None, update), u @ W + update.double())

    @pytest.mark.parametrize("turned", [False, True])
    def test_stochastic_rounding_gives_the_bits_of_the_twin(self, turned):
        d = Draw(3, 45, 50, 4)
        update, base = d.random(50, 45), d.W.T.contiguous().T if turned else d.W
        expected = rounding.stochastic(update.float() + base.float(), d.seed)
        assert torch.equal(kernels.stochastic_sum(update, base, d.seed), expected)

    def test_the_same_bits_each_time(self):
        d = Draw(37, 70, 41, 32)
        gradient = d.random(d.q, 70)
        first, second = (kernels.scaling_gradients(gradient.unsqueeze(0), d.A, d.lam, d.gamma) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_fresh_memory_is_poisoned(self):
        """Else a value that no kernel wrote could go unnoticed above."""
        assert torch.empty(9, device=DEVICE).isnan().all()


class TestRounding:
    def test_right_on_average_where_rounding_to_nearest_loses_the_update(self):
        d = Draw(3, 32, 40, 32)
        d.W.fill_(1.0)
        bases = d.bases()
        exact = d.exact().weight(d.exact().scaled(d.lam.double() * 1e-5, d.gamma.double()))
        assert exact.abs().max() < 2**-9  # half an ulp below 1
        scaled = bases.scaled(d.lam * 1e-5, d.gamma)
        assert (bases.weight(scaled, d.W) == 1).all()
        seeds = torch.arange(12, dtype=torch.int32, device=DEVICE)
        drawn = torch.stack([bases.weight(scaled, d.W, seed).double() for seed in seeds.split(1)])
        errors = (drawn - (1 + exact)).mean(0)
        standard_error = errors.std() / errors.numel() ** 0.5
        assert errors.mean().abs() < 4 * standard_error
        assert ((drawn - 1 - exact).mean(0) * exact.sign()).mean().abs() < 4 * standard_error


WAYS = [
    Plan("token", "token", "token"),
    Plan("weight", "weight", "weight"),
    Plan("fused", "fused", "weight"),
    Plan("weight", "token", "token"),
]


def results(bases, tensors, weight, bias, grad):
    x, lam, gamma = (value.clone().requires_grad_() for value in tensors)
    y = adapted_linear(x, bases, lam, gamma, 1.7, len(weight), weight, bias)
    return {"y": y.detach()} | dict(
        zip(("x", "lam", "gamma"), torch.autograd.grad(y, (x, lam, gamma), grad), strict=True)
    )


class TestLayers:
    @pytest.mark.parametrize("plan", WAYS, ids=lambda plan: "-".join((plan.output, plan.grad_input, plan.grad_basis)))
    @pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
    @pytest.mark.parametrize(("out", "in_"), [(50, 39), (39, 50)], ids=["tall", "wide"])
    def test_every_plan_agrees_with_dense_bases_in_float64(self, out, in_, plan, stochastic, monkeypatch):
        m, M, r = min(out, in_), max(out, in_), 6
        d = Draw(1, m, M, r)
        tensors = (d.random(5, in_), d.lam, d.gamma)
        weight, bias, grad = d.random(out, in_), d.random(out), d.random(5, out)
        monkeypatch.setattr(rounding, "_stochastic", stochastic)
        with force(plan):
            found = results(d.bases(), tensors, weight, bias, grad)
            wide = [value.double() for value in (weight, bias, grad)]
            expected = results(d.exact(), [t.double() for t in tensors], *wide)
        for name, value in expected.items():
            error = (found[name].double() - value).norm() / value.norm()
            assert error < 0.03, f"{name}: {error:.1e}"

    @pytest.mark.parametrize("plan", WAYS[:2], ids=["token", "weight"])
    @pytest.mark.parametrize(("out", "in_"), [(50, 39), (39, 50)], ids=["tall", "wide"])
    @kinds
    def test_float16_takes_b_in_its_unit(self, out, in_, plan, coded):
        """x B would leave float16's range, and Ã alone be coarse in it; what they make is neither."""
        m, M, r = min(out, in_), max(out, in_), 6
        d = Draw(1, m, M, r, torch.float16, coded)
        tensors = (d.random(5, in_) * 4000, d.lam * 1e-5, d.gamma)
        weight, grad = torch.zeros_like(d.random(out, in_)), d.random(5, out)
        assert d.bases().unit == unit(torch.float16) < 1
        with force(plan):
            found = results(d.bases(), tensors, weight, None, grad)
            expected = results(d.exact(), [t.double() for t in tensors], weight.double(), None, grad.double())
        for name, value in expected.items():
            error = (found[name].double() - value).norm() / value.norm()
            assert error < 0.01, f"{name}: {error:.1e}"

    def test_parameters_in_half_precision(self):
        d = Draw(5, 20, 27, 6)
        grad = d.random(5, 27)
        lam, gamma = d.lam.bfloat16(), d.gamma.bfloat16()
        found = results(d.bases(), (d.v, lam, gamma), d.W, d.u[0], grad)
        expected = results(d.bases(), (d.v, lam.float(), gamma.float()), d.W, d.u[0], grad)
        for name, value in expected.items():
            assert found[name].dtype == torch.bfloat16
            assert (found[name] - value).norm() <= 0.01 * value.norm(), name

    def test_doctor_tries_them(self):
        (finding,) = (finding for finding in environment._products() if finding.name == "GPU kernels (Triton)")
        assert finding.verdict == "ok", finding.detail

    @pytest.mark.parametrize("plan", WAYS[:2], ids=["token", "weight"])
    def test_second_derivatives_are_those_without_kernels(self, plan, monkeypatch):
        d, found = Draw(4, 20, 27, 6), []
        for enabled in (True, False):
            monkeypatch.setattr(availability, "_enabled", enabled)
            x, lam, gamma = (value.clone().requires_grad_() for value in (d.v, d.lam, d.gamma))
            with force(plan):
                y = adapted_linear(x, d.bases(), lam, gamma, 1.7, 27, d.W)
            first = torch.autograd.grad(y.float().square().sum(), (x, lam, gamma), create_graph=True)
            found.append(torch.autograd.grad(sum(g.float().square().sum() for g in first), (x, lam, gamma)))
        for mine, theirs in zip(*found, strict=True):
            assert (mine - theirs).norm() <= 0.05 * theirs.norm()

    def test_vmap(self):
        d = Draw(4, 20, 27, 6)
        scales = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
        for weight in (None, d.W):
            found = torch.func.vmap(lambda s, w=weight: adapted_linear(d.v, d.bases(), d.lam * s, d.gamma, 1.0, 27, w))
            each = [adapted_linear(d.v, d.bases(), d.lam * s, d.gamma, 1.0, 27, weight) for s in scales]
            torch.testing.assert_close(found(scales), torch.stack(each))

    @pytest.mark.parametrize(
        "kind", [{}, {"very_sparse": True}, {"structured": True, "groups": 4}], ids=["dense", "codes", "structured"]
    )
    def test_a_model_uses_them_and_learns_as_without(self, kind, monkeypatch):
        """Linear and Conv1D, tall and wide, of one number of bases and of another."""
        base = nn.Sequential(nn.Linear(20, 26), Conv1D(12, 26), nn.Linear(12, 20)).bfloat16().to(DEVICE)
        for parameter in base.parameters():
            nn.init.normal_(parameter, std=0.1)
        x, losses = torch.randn(6, 20, device=DEVICE).bfloat16(), []
        for enabled in (True, False):
            monkeypatch.setattr(availability, "_enabled", enabled)
            model = get_peft_model(copy.deepcopy(base), RandLoraConfig(r=8, target_modules=["0", "1", "2"], **kind))
            optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
            losses.append([])
            launches = Launches(monkeypatch)
            for _ in range(2):
                loss = model(x).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item())
            assert (launches.kernels > 0) is enabled
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
        assert losses[0][-1] < losses[0][0]

    @pytest.mark.parametrize(
        ("plan", "kind"),
        [(WAYS[0], {}), (WAYS[1], {"sparse": True}), (WAYS[0], {"structured": True})],
        ids=["token, dense", "weight, codes", "token, structured"],
    )
    def test_one_compiled_graph_for_several_numbers_of_tokens(self, plan, kind):
        config = RandLoraConfig(r=8, target_modules=["0"], **kind)
        model = get_peft_model(nn.Sequential(nn.Linear(40, 24)).bfloat16(), config).to(DEVICE)
        nn.init.normal_(model.base_model.model[0].randlora_lambda["default"])
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        step = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        frames = []
        with force(plan):
            for tokens in (9, 12, 10):
                x = torch.randn(tokens, 40, device=DEVICE).bfloat16().requires_grad_()
                step(x).sum().backward()
                frames.append(
                    counter.frame_count
                )  # the first time Dynamo may start again, with the scaling as a number
                gradient, x.grad = x.grad, None
                model(x).sum().backward()
                torch.testing.assert_close(gradient, x.grad)
        assert len(set(frames)) == 1


def launches(layer, x, monkeypatch, plan=None):
    """Of a training step of the layer, as Launches counts them."""
    grad = torch.randn_like(layer(x.detach()))  # prepares the call
    with force(plan) if plan is not None else ExitStack():
        layer(x).backward(grad)
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        counted = Launches(monkeypatch)
        with counted:
            layer(x).backward(grad)
    return counted


@pytest.mark.parametrize(("out", "in_"), [(24, 20), (20, 24)], ids=["tall", "wide"])
class TestLaunches:
    """With few tokens, launches decide on a GPU: a step of ours has no more than one of LoRA's without dropout."""

    def layers(self, out, in_, **kind):
        base = nn.Sequential(nn.Linear(in_, out, bias=False)).bfloat16().to(DEVICE)
        ours = get_peft_model(copy.deepcopy(base), RandLoraConfig(r=8, target_modules=["0"], **kind))
        lora = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["0"]))
        return ours.base_model.model[0], lora.base_model.model[0]

    def tokens(self, in_):
        return torch.randn(5, in_, device=DEVICE).bfloat16().requires_grad_()

    @pytest.mark.parametrize("plan", WAYS[:2], ids=["token", "weight"])
    @pytest.mark.parametrize(
        "kind", [{}, {"very_sparse": True}, {"structured": True, "groups": 4}], ids=["dense", "codes", "structured"]
    )
    def test_no_more_than_loras(self, out, in_, plan, kind, monkeypatch):
        ours, lora = self.layers(out, in_, **kind)
        mine = launches(ours, self.tokens(in_), monkeypatch, plan)
        theirs = launches(lora, self.tokens(in_), monkeypatch)
        assert mine.kernels > 0 == theirs.kernels
        more = "structured" in kind  # an order of memory
        assert mine.total <= theirs.total + more, (mine.kernels, mine.operations, theirs.operations)

    @pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}], ids=["dense", "sparse", "very"])
    def test_those_of_a_training_step_one_by_one(self, out, in_, kind, monkeypatch):
        ours, _ = self.layers(out, in_, **kind)
        mine = launches(ours, self.tokens(in_), monkeypatch, WAYS[0])
        assert mine.kernels == 5  # Ã twice, the sums of y and dx, dλ and dγ
        products = mine.operations.count("aten::mm")
        assert products == (3 if out > in_ else 4)  # h, dy B and dÃ; where out < in both factors come before B
        others = [name for name in mine.operations if name != "aten::mm"]
        shares = blocks(min(out, in_), gradients.BLOCK.columns)  # of dλ
        assert others == ["aten::sum.dim_IntList"] * (shares > 1), others


if not interpreting:

    def test_a_cuda_graph_draws_new_rounding_at_each_replay():
        d = Draw(3, 64, 64, 32)
        bases = d.bases()

        def call():
            return bases.weight(bases.scaled(d.lam * 1e-5, d.gamma), d.W, rounding.new_seed(DEVICE))

        call()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        replays = []
        for _ in range(2):
            graph.replay()
            replays.append(out.clone())
        assert not torch.equal(*replays)
