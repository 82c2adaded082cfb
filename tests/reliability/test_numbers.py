"""Every size, scale and dtype: results within the roundings of the dtype, and finite where the numbers are."""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from ops.test_linear import PLANS
from randlora import RandLoraLayer
from randlora.ops import bf16, naive
from randlora.ops.plan import Plan, force
from tuner.helpers import conv1d, ours, randomise

from .children import SLOW, ended_well, start

ROUNDINGS = 5
"""To the dtype of the products on the way to a result, at most: of A, B, Ã, then of x Ãᵀ or ΔW, and of the result."""

UNIT = {torch.float16: 2.0**-6}
"""In which B stands in products of that dtype."""


@dataclass(frozen=True)
class Case:
    """A layer with an adapter, and what it is called with; numbers after the dtype are powers of ten."""

    kind: str
    out: int
    in_: int
    rank: int
    bases: str
    dtype: torch.dtype
    alpha: float
    update: float
    inputs: float
    grads: float
    batch: tuple[int, ...]
    plan: Plan
    seed: int

    def layer(self) -> RandLoraLayer:
        """With s·λ of the size of ``update``, whatever the scaling s."""
        torch.manual_seed(self.seed)
        make = {"Linear": nn.Linear, "Conv1D": conv1d, "Conv1d": lambda *sizes: nn.Conv1d(*sizes, 2)}
        base = nn.Embedding(self.in_, self.out) if self.kind == "Embedding" else make[self.kind](self.in_, self.out)
        sparse = {} if self.bases == "dense" else {self.bases: True}
        model = nn.Sequential(base).to(self.dtype)
        layer = ours(model, r=self.rank, randlora_alpha=10**self.alpha, target_modules=["0"], **sparse).model[0]
        layer.randlora_lambda["default"].data.normal_().mul_(10**self.update / layer.scaling["default"])
        gamma = layer.randlora_gamma["default"].data
        gamma.normal_().div_(max(gamma.shape))
        return layer.double() if self.dtype == torch.float64 else layer

    def input(self) -> Tensor:
        if self.kind == "Embedding":
            return torch.randint(self.in_, self.batch)
        shape = (*self.batch[:1], self.in_, 4) if self.kind == "Conv1d" else (*self.batch, self.in_)
        return (torch.randn(shape, dtype=torch.float64) * 10**self.inputs).to(self.dtype).requires_grad_()


sizes = st.one_of(st.integers(1, 3), st.integers(4, 24))
cases = st.builds(
    Case,
    kind=st.sampled_from(["Linear", "Linear", "Conv1D", "Conv1d", "Embedding"]),
    out=sizes,
    in_=sizes,
    rank=st.integers(1, 40),
    bases=st.sampled_from(["dense", "sparse", "very_sparse", "structured"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float16]),
    alpha=st.sampled_from([-6, -3, 0, 3, 6]),
    update=st.floats(-5, 3),
    inputs=st.floats(-2, 4),
    grads=st.floats(-3, 3),
    batch=st.sampled_from([(5,), (2, 3), (0,), (0, 3), (3, 0), (1, 40)]),
    plan=st.sampled_from(PLANS),
    seed=st.integers(0, 1000),
)


@dataclass
class Exact:
    """The formula in float64, and the same of absolute values: what rounding errors are to be measured by.

    Where a number is rounded, the absolute values have the smallest normal number added: below it, an error is no
    longer relative to the number that is rounded, but to that.
    """

    case: Case
    layer: RandLoraLayer
    x: Tensor
    grad: Tensor

    def __post_init__(self) -> None:
        layer, dtype = self.layer, self.case.dtype
        self.base = copy.deepcopy(layer.get_base_layer()).double()
        self.lam, self.gamma = (
            p["default"].detach().double().requires_grad_() for p in (layer.randlora_lambda, layer.randlora_gamma)
        )
        basis = layer.basis("default")
        self.A, self.B = basis.tensors(self.grad.device, torch.float64, layer.sizes("default"))
        self.scaling, self.unit, self.tiny = layer.scaling["default"], UNIT.get(dtype, 1), torch.finfo(dtype).tiny
        if basis.factor != 1:  # products are without the factors
            of_A, of_B = basis.stored.factors
            self.A, self.B, self.scaling = self.A / of_A, self.B / of_B, self.scaling * basis.factor

    def values(self) -> dict[str, Tensor]:
        """Output, merged weight, and the gradient of each input by name."""
        layer = self.layer
        update = naive.delta_weight(
            self.A, self.B, self.lam, self.gamma, self.scaling, layer.out_features, layer.in_features
        )
        weight = self.base.weight + self._in_layout(update)
        y, leaves = self._call(self.base, self.x, weight)
        grads = torch.autograd.grad(y, [*leaves.values(), self.lam, self.gamma], self.grad.double())
        return {"y": y, "merged": weight} | dict(zip([*leaves, "lam", "gamma"], grads, strict=True))

    def magnitudes(self) -> tuple[dict[str, Tensor], float]:
        """What is summed to each result, without signs; and the largest of the numbers that are formed on the way."""
        tiny, wide = self.tiny, self.layer.out_features < self.layer.in_features
        A, B = self.A.abs() + tiny, self.B.abs() * self.unit + tiny
        lam, gamma = self.lam.detach().abs() * self.scaling / self.unit, self.gamma.detach().abs()
        At = (lam.unsqueeze(-1) * A.unsqueeze(1) * gamma).flatten(0, 1) + tiny
        update = B @ At + tiny
        slack = tiny * (1 + B.sum(1).max() + At.sum(0).max())  # of what is rounded on the way of the token plan

        base = copy.deepcopy(self.base)
        for parameter in base.parameters():
            parameter.data.abs_()
        weight = (base.weight + self._in_layout(update.T if wide else update)).requires_grad_()
        y, leaves = self._call(base, self.x.detach().abs(), weight)
        grad = self.grad.double().abs()
        *dx, d_weight = torch.autograd.grad(y, [*leaves.values(), weight], grad)
        sides = [self.x.detach().double().abs(), grad]
        d_weight = self._as_matrix(d_weight) + tiny
        dAt = B.T @ d_weight + tiny * (1 + max(side.sum() for side in sides))
        weighted = (dAt.unflatten(0, lam.shape) * A.unsqueeze(1)) * (self.scaling / self.unit)
        found = {
            "y": y.detach() + slack,
            "merged": weight.detach(),
            "lam": (weighted * gamma).sum(-1),
            "gamma": (weighted * self.lam.detach().abs().unsqueeze(-1)).sum(0),
        } | {name: value + slack for name, value in zip(leaves, dx, strict=True)}
        formed = [found["y"], *dx, At, update, d_weight, dAt]
        if self.case.kind in ("Linear", "Conv1D"):
            u, v = sides if wide else sides[::-1]
            formed += [u @ B, v @ At.T]
        return found, max((float(t.max()) for t in formed if t.numel()), default=0.0)

    def terms(self) -> int:
        """How many terms the sums on the way to a result have, end to end."""
        return sum(self.lam.shape) + sum(self.gamma.shape) + 2 * sum(self.layer_shape) + 2 * self.grad.numel() + 8

    @property
    def layer_shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    def _call(self, base: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not x.is_floating_point():
            return functional_call(base, {"weight": weight}, (x,)), {}
        x = x.detach().double().requires_grad_()
        return functional_call(base, {"weight": weight}, (x,)), {"x": x}

    def _in_layout(self, update: Tensor) -> Tensor:
        return (update.T if self.case.kind in ("Conv1D", "Embedding") else update).reshape(self.base.weight.shape)

    def _as_matrix(self, weight: Tensor) -> Tensor:  # (M, m)
        turned = self.case.kind in ("Conv1D", "Embedding")
        matrix = weight.T if turned else weight.reshape(self.layer_shape)
        return matrix.T if self.layer.out_features < self.layer.in_features else matrix


LARGE_ACTIVATIONS = Case(  # at PEFT's alpha; x B leaves float16 if B stands as it is
    *("Linear", 16, 24, 8, "dense", torch.float16),
    alpha=math.log10(640),
    update=-3,
    inputs=4,
    grads=-1,
    batch=(5,),
    plan=Plan("token", "token", "token"),
    seed=0,
)


@settings(max_examples=10 * settings().max_examples)
@given(case=cases)
@example(case=LARGE_ACTIVATIONS)
def test_results_are_those_of_float64_within_roundings(case):
    layer, x = case.layer(), case.input()
    with force(case.plan):
        y = layer(x)
        grad = (torch.randn(y.shape, dtype=torch.float64) * 10**case.grads).to(y.dtype)
        y.backward(grad)
    found = {name: p["default"].grad for name, p in (("lam", layer.randlora_lambda), ("gamma", layer.randlora_gamma))}
    found |= {"y": y.detach()} | ({"x": x.grad} if x.is_floating_point() else {})
    before = layer.get_base_layer().weight.clone()
    layer.merge()
    found["merged"] = layer.get_base_layer().weight.detach()
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, before)

    exact = Exact(case, layer, x, grad)
    magnitudes, largest = exact.magnitudes()
    wide = torch.promote_types(case.dtype, torch.float32)  # in which sums are formed
    unit = (ROUNDINGS * torch.finfo(case.dtype).eps + exact.terms() * torch.finfo(wide).eps) / 2
    fits = largest < torch.finfo(case.dtype).max
    for name, expected in exact.values().items():
        error = (found[name].double() - expected).abs()
        finite = error.isfinite()
        assert finite.all() or not fits, f"{name} is not finite"
        excess = (error - unit * magnitudes[name])[finite]
        assert (excess <= 0).all(), f"{name}: {excess.max():.1e} beyond the bound"


TOKENS = 2**20
WIDTH = 64 if SLOW else 32


def peaks(layer: nn.Module, x: Tensor) -> tuple[float, float]:
    """What the process holds at most beyond input, output and gradients, forward and backward, as a multiple of x."""

    def memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    def peak_of(work):
        before = memory("VmRSS:")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        result = work()
        return result, memory("VmHWM:") - before

    y, forward = peak_of(lambda: layer(x))
    grad = torch.full_like(y, 0.01)
    _, backward = peak_of(lambda: y.backward(grad))
    return (forward - y.nbytes) / x.nbytes, (backward - x.grad.nbytes) / x.nbytes


def million_tokens(dtype: torch.dtype) -> Tensor:
    return torch.randn(1, TOKENS, WIDTH, dtype=dtype).requires_grad_()


def linear(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "config", "plan"),
    [
        (torch.float32, {}, None),
        (torch.bfloat16, {}, None),
        (torch.float32, {"sparse": True}, None),
        (torch.bfloat16, {"sparsity": 32.0}, None),
        (torch.float32, {"sparsity": 32.0}, Plan("fused", "fused", "token")),  # what wide layers would choose
    ],
    ids=["dense", "dense-bf16", "sparse", "very-sparse-bf16", "very-sparse"],
)
def test_a_million_tokens_take_no_memory_beyond_what_goes_in_and_out(dtype, config, plan):
    # of joined copies where torch's own product of half precision is fast
    limit = 2.2 if dtype == torch.bfloat16 and not bf16._in_blocks(dtype) else 0.1

    def held():
        layer = randomise(ours(linear(dtype), r=8, target_modules=["0"], **config)).model[0]
        with nullcontext() if plan is None else force(plan):
            layer(torch.ones(1, WIDTH, dtype=dtype)).sum().backward()  # whatever is made once
            forward, backward = peaks(layer, million_tokens(dtype))
        assert forward < limit, forward
        assert backward < limit, backward

    assert ended_well(start(held))


def test_peft_lora_takes_more_memory_for_a_million_tokens():
    def held():
        model = peft.get_peft_model(linear(torch.float32), peft.LoraConfig(r=8, target_modules=["0"]))
        forward, backward = peaks(model, million_tokens(torch.float32))
        assert forward > 1, forward
        assert backward > 1, backward

    assert ended_well(start(held))


def step_in_float16(layer: nn.Module, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> float:
    """A training step of mean squared outputs; the sums over its tokens leave float16 at the first scales."""
    x = torch.randn(512, 24, generator=torch.Generator().manual_seed(3)).half() * 8
    loss = (layer(x).float() - 1).square().mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


@pytest.mark.parametrize("plan", [Plan("token", "token", "token"), Plan("weight", "weight", "weight")], ids=str)
@pytest.mark.parametrize("shape", [(24, 40), (24, 16)], ids=["tall", "wide"])
def test_a_grad_scaler_skips_what_overflows_and_finds_a_scale(plan, shape):
    torch.manual_seed(0)
    model = ours(nn.Sequential(nn.Linear(*shape)).half(), r=5, target_modules=["0"])
    lam, gamma = parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=5)
    skipped, losses = 0, []
    with force(plan):
        for _ in range(60):
            before = lam.detach().clone(), gamma.detach().clone(), scaler.get_scale()
            losses.append(step_in_float16(model, scaler, optimizer))
            overflows = not all(p.grad.isfinite().all() for p in parameters)
            assert overflows == (scaler.get_scale() < before[2])
            assert overflows == (torch.equal(lam, before[0]) and torch.equal(gamma, before[1]))
            skipped += overflows
    assert 1 <= skipped < 30
    assert all(p.isfinite().all() for p in parameters)
    assert losses[-1] < 0.9 * losses[0]
