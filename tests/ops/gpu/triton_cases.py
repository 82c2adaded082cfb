"""The kernels against their twins in float64. ``test_triton.py`` runs this file in a process of its own.

On a GPU: ``pytest tests/ops/gpu/triton_cases.py``. Elsewhere with TRITON_INTERPRET=1, which has to be set before
anything imports Triton, in small blocks that divide no dimension here.
"""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from randlora import RandLoraConfig, get_peft_model
from randlora.analysis import environment
from randlora.ops import rounding
from randlora.ops.bases.dense import DenseBases
from randlora.ops.gpu import availability, operators, reference
from randlora.ops.gpu.grouped import GroupedBases, grouped
from randlora.ops.gpu.tiles import interpreting
from randlora.ops.linear import adapted_linear
from randlora.ops.plan import Plan, force
from randlora.ops.units import in_units

DEVICE = torch.device("cpu" if interpreting else "cuda")
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}

# (tokens, m, M, rank): from few columns to many, ranks that are powers of two and not, of one basis and of many
SIZES = [(7, 45, 50, 4), (33, 39, 70, 6), (1, 33, 35, 20), (37, 70, 41, 32), (3, 20, 67, 64), (35, 37, 40, 256)]
sizes = pytest.mark.parametrize(("T", "m", "M", "r"), SIZES)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


class Draw:
    """Operands of a layer, on the device; ``codes`` makes the bases ternary."""

    def __init__(self, T, m, M, r, dtype=torch.bfloat16, codes=False):
        n = -(-m // r)
        self.q, self.dtype, self.codes = n * r, dtype, codes
        self.A = self.basis(r, m + 5)[:, :m]  # cut from a wider one, as layers have it
        self.lam, self.gamma = self.random(r, n).float(), self.random(n, m).float()
        self.v, self.u, self.h = self.random(T, m), self.random(T, M), self.random(T, self.q)
        self.B, self.W, self.bias = self.basis(M, self.q), self.random(M, m), self.random(m)
        self.seed = torch.tensor([20261124], dtype=torch.int32, device=DEVICE)

    def random(self, *shape):
        return torch.randn(shape).to(self.dtype).to(DEVICE)

    def basis(self, *shape):
        return torch.randint(-1, 2, shape, dtype=torch.int8, device=DEVICE) if self.codes else self.random(*shape)


def check(name, *arguments, roundings=4.0):
    """A kernel's results against its twin's in float64, in units of the dtype's roundings."""
    wide = [
        torch.float64 if isinstance(value, torch.dtype) else value.double() if torch.is_tensor(value) else value
        for value in arguments
    ]
    found, expected = getattr(operators, name)(*arguments), getattr(reference, name)(*wide)
    pairs = [(found, expected)] if torch.is_tensor(found) else zip(found, expected, strict=True)
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        eps = EPS.get(mine.dtype, 1e-6)  # dλ and dγ stay in float32
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error <= roundings * eps, f"{error:.1e}"


class TestAgainstTheTwins:
    @sizes
    @dtypes
    def test_the_update(self, T, m, M, r, dtype):
        d = Draw(T, m, M, r, dtype)
        check("times_scaled", d.B, d.A, d.lam, d.gamma, dtype)

    @sizes
    def test_the_update_and_a_weight_in_either_memory_order(self, T, m, M, r):
        d = Draw(T, m, M, r)
        for base in (d.W, d.W.T.contiguous().T):
            check("times_scaled", d.B, d.A, d.lam, d.gamma, d.dtype, base)
            assert operators.times_scaled(d.B, d.A, d.lam, d.gamma, d.dtype, base).stride() == base.stride()

    @sizes
    def test_tokens_times_the_scaled_basis_beside_the_base_product(self, T, m, M, r):
        d = Draw(T, m, M, r)
        check("times_scaled", d.h, d.A, d.lam, d.gamma, d.dtype, None, d.u, d.W, d.bias)
        check("times_scaled", d.h, d.A, d.lam, d.gamma, d.dtype, None, d.u, d.W.T.contiguous().T)

    @sizes
    @dtypes
    def test_tokens_times_the_transposed_basis(self, T, m, M, r, dtype):
        d = Draw(T, m, M, r, dtype)
        check("times_scaled_transposed", d.v, d.A, d.lam, d.gamma)

    @sizes
    def test_a_sum_of_products(self, T, m, M, r):
        d = Draw(T, m, M, r)
        check("sum_of_products", d.v, d.W.T, d.h, d.B.T)
        check("sum_of_products", d.u, d.W, None, None, d.bias)

    @sizes
    @dtypes
    def test_gradients_from_the_weights_gradient_and_from_tokens(self, T, m, M, r, dtype):
        d = Draw(T, m, M, r, dtype)
        check("scaling_gradients", d.B, d.W, d.A, d.lam, d.gamma)
        check("scaling_gradients", d.h, d.v, d.A, d.lam, d.gamma)

    @pytest.mark.parametrize(("T", "m", "M", "r"), SIZES[:3])
    def test_codes_of_sparse_bases(self, T, m, M, r):
        d = Draw(T, m, M, r, codes=True)
        check("times_scaled", d.B, d.A, d.lam, d.gamma, d.dtype, d.W)
        check("scaling_gradients", d.B, d.W, d.A, d.lam, d.gamma)
        check("times_scaled_transposed", d.v, d.A, d.lam, d.gamma)
        check("sum_of_products", d.v, d.W.T, d.h, d.B.T)
        check("sum_of_products", d.u, d.B)

    def test_the_same_bits_each_time(self):
        d = Draw(37, 70, 41, 32)
        for kernel, arguments in (
            (operators.scaling_gradients, (d.B, d.W, d.A, d.lam, d.gamma)),
            (operators.times_scaled, (d.B, d.A, d.lam, d.gamma, d.dtype, d.W, None, None, None, d.seed)),
        ):
            first, second = kernel(*arguments), kernel(*arguments)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_fresh_memory_is_poisoned(self):
        """Else a value that no kernel wrote could go unnoticed above."""
        assert torch.empty(9, device=DEVICE).isnan().all()


class TestRounding:
    def test_the_bits_are_those_of_the_twin(self):
        d = Draw(3, 45, 50, 4)
        zero = torch.zeros_like(d.lam)
        total = torch.randn(50, 45, device=DEVICE)
        # ΔW = 0, so that both round the same float32 numbers: a bf16 base, and a bias of 24 bits
        found = operators.times_scaled(d.B, d.A, zero, d.gamma, d.dtype, d.W, None, None, total[0], d.seed)
        assert torch.equal(found, rounding.stochastic(d.W.float() + total[0], d.seed))

    def test_right_on_average_where_rounding_to_nearest_loses_the_update(self):
        d = Draw(3, 40, 64, 32)
        d.W.fill_(1.0)
        exact = reference.times_scaled(d.B, d.A, d.lam * 1e-5, d.gamma, torch.float32)
        assert exact.abs().max() < 2**-9  # half an ulp below 1
        nearest = operators.times_scaled(d.B, d.A, d.lam * 1e-5, d.gamma, d.dtype, d.W)
        assert (nearest == 1).all()
        seeds = torch.arange(12, dtype=torch.int32, device=DEVICE)
        drawn = torch.stack(
            [
                operators.times_scaled(d.B, d.A, d.lam * 1e-5, d.gamma, d.dtype, d.W, None, None, None, seed).float()
                for seed in seeds.split(1)
            ]
        )
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
            found = results(GroupedBases(d.A, grouped(d.B, r), d.dtype), tensors, weight, bias, grad)
            wide = [value.double() for value in (weight, bias, grad)]
            expected = results(
                DenseBases(d.A.double().unsqueeze(1), d.B.double(), torch.float64), [t.double() for t in tensors], *wide
            )
        for name, value in expected.items():
            error = (found[name].double() - value).norm() / value.norm()
            assert error < 0.03, f"{name}: {error:.1e}"

    @pytest.mark.parametrize("plan", WAYS[:2], ids=["token", "weight"])
    @pytest.mark.parametrize(("out", "in_"), [(50, 39), (39, 50)], ids=["tall", "wide"])
    @pytest.mark.parametrize("codes", [False, True])
    def test_float16_takes_b_in_its_unit(self, out, in_, plan, codes):
        """x B would leave float16's range, and Ã alone be coarse in it; what they make is neither."""
        m, M, r = min(out, in_), max(out, in_), 6
        d = Draw(1, m, M, r, torch.float16, codes)
        tensors = (d.random(5, in_) * 4000, d.lam * 1e-5, d.gamma)
        weight, grad = torch.zeros_like(d.random(out, in_)), d.random(5, out)
        B = grouped(d.B, r)
        with force(plan):
            bases = GroupedBases(d.A, B if codes else in_units(B, torch.float16), d.dtype)
            found = results(bases, tensors, weight, None, grad)
            exact = DenseBases(d.A.double().unsqueeze(1), d.B.double(), torch.float64)
            expected = results(exact, [t.double() for t in tensors], weight.double(), None, grad.double())
        for name, value in expected.items():
            error = (found[name].double() - value).norm() / value.norm()
            assert error < 0.01, f"{name}: {error:.1e}"

    def test_parameters_in_half_precision(self):
        d = Draw(5, 20, 27, 6)
        bases, grad = GroupedBases(d.A, grouped(d.B, 6), d.dtype), d.random(5, 27)
        lam, gamma = d.lam.bfloat16(), d.gamma.bfloat16()
        found = results(bases, (d.v, lam, gamma), d.W, d.u[0], grad)
        expected = results(bases, (d.v, lam.float(), gamma.float()), d.W, d.u[0], grad)
        for name, value in expected.items():
            assert found[name].dtype == torch.bfloat16
            assert (found[name] - value).norm() <= 0.01 * value.norm(), name

    def test_doctor_tries_them(self):
        (finding,) = (finding for finding in environment.examine() if finding.name == "GPU kernels (Triton)")
        assert finding.verdict == "ok", finding.detail

    def test_second_derivatives_are_those_of_the_twins(self):
        d = Draw(4, 20, 27, 6)
        found = []
        for kernels in (operators, reference):
            lam, gamma = (value.clone().requires_grad_() for value in (d.lam, d.gamma))
            y = kernels.times_scaled(d.B, d.A, lam, gamma, d.dtype)
            d_lam, d_gamma = kernels.scaling_gradients(d.B, y, d.A, lam, gamma)
            total = d_lam.square().sum() + d_gamma.sum()
            found.append(torch.autograd.grad(total, (lam, gamma)))
        for mine, theirs in zip(*found, strict=True):
            assert (mine - theirs).norm() <= 0.02 * theirs.norm()

    @pytest.mark.parametrize("kind", [{}, {"very_sparse": True}], ids=["dense", "codes"])
    def test_a_model_uses_them_and_learns_as_without(self, kind, monkeypatch):
        """Linear and Conv1D, tall and wide, of one number of bases and of another."""
        base = nn.Sequential(nn.Linear(40, 50), Conv1D(24, 50), nn.Linear(24, 40)).bfloat16().to(DEVICE)
        for parameter in base.parameters():
            nn.init.normal_(parameter, std=0.1)
        x, losses = torch.randn(6, 40, device=DEVICE).bfloat16(), []
        calls = []
        for enabled in (True, False):
            monkeypatch.setattr(availability, "_enabled", enabled)
            model = get_peft_model(copy.deepcopy(base), RandLoraConfig(r=8, target_modules=["0", "1", "2"], **kind))
            layer = model.base_model.model[0]
            calls.append(type(layer._operands("default", DEVICE, torch.bfloat16)).__name__)
            optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
            losses.append([])
            for _ in range(3):
                loss = model(x).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item())
        assert calls[0] == "GroupedBases" != calls[1]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
        assert losses[0][-1] < losses[0][0]

    @pytest.mark.parametrize("plan", WAYS[:2], ids=["token", "weight"])
    def test_one_compiled_graph_for_several_numbers_of_tokens(self, plan):
        model = get_peft_model(nn.Sequential(nn.Linear(40, 24)).bfloat16(), RandLoraConfig(r=8, target_modules=["0"]))
        model.to(DEVICE)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        step = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        frames = []
        with force(plan):
            for tokens in (5, 9, 7):
                x = torch.randn(tokens, 40, device=DEVICE).bfloat16().requires_grad_()
                step(x).sum().backward()
                frames.append(
                    counter.frame_count
                )  # the first time Dynamo may start again, with the scaling as a number
                gradient, x.grad = x.grad, None
                model(x).sum().backward()
                torch.testing.assert_close(gradient, x.grad)
        assert len(set(frames)) == 1

    def test_vmap(self):
        d = Draw(4, 20, 27, 6)
        scales = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
        found = torch.func.vmap(lambda s: operators.times_scaled(d.h, d.A, d.lam * s, d.gamma, d.dtype))(scales)
        expected = torch.stack([operators.times_scaled(d.h, d.A, d.lam * s, d.gamma, d.dtype) for s in scales])
        assert torch.equal(found, expected)


if not interpreting:

    def test_a_cuda_graph_draws_new_rounding_at_each_replay():
        d = Draw(3, 64, 64, 32)

        def call():
            seed = rounding.new_seed(DEVICE)
            return operators.times_scaled(d.B, d.A, d.lam * 1e-5, d.gamma, d.dtype, d.W, None, None, None, seed)

        call()  # tunes and compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        replays = []
        for _ in range(2):
            graph.replay()
            replays.append(out.clone())
        assert not torch.equal(*replays)
