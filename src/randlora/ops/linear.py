"""The adapted linear layer as one differentiable function.

Names follow the paper: A (r, m) and B (M, q) are the frozen bases with q = n·r, Ã = (s·λ)·A·γ of shape (q, m), and
ΔW = B Ã, transposed where out < in. Only x, λ, γ (and references to the frozen A, B, W) are kept for the backward;
Ã and ΔW are temporaries of one call. ``naive.py`` is the plain twin.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from randlora.ops import dispatch, rounding
from randlora.ops import plan as planner
from randlora.ops.bf16 import sum_of_products
from randlora.ops.grouped import Adapted, GroupedBases
from randlora.ops.operands import DenseBases, product
from randlora.ops.plan import Plan, Problem, choose
from randlora.ops.sparse import Csr, SparseBases
from randlora.ops.units import unit

_WIDE = (torch.float32, torch.float64)
_WITHOUT_AUTOCAST = ("meta", "vulkan")  # torch 2.11 cannot trace the question whether a device has it

Bases = DenseBases | SparseBases | GroupedBases


def adapted_linear(
    x: Tensor,  # (..., in)
    bases: Bases,
    lam: Tensor,  # (r, n)
    gamma: Tensor,  # (n, m)
    scaling: float,
    out_features: int,
    weight: Tensor | None = None,  # (out, in)
    bias: Tensor | None = None,  # (out,)
    summed: Tensor | None = None,  # (out, in)
) -> Tensor:  # (..., out)
    """X (W + ΔW)ᵀ + bias, or x ΔWᵀ alone where no ``weight`` is given, in the dtype of x.

    The way of computing it is the cheapest that is exact (``plan.choose``). Differentiable in x, λ, γ and bias, any
    number of times; ``weight`` is taken as frozen. ``summed`` is W + ΔW where the caller holds it already: then that
    is what output and dx are computed with.
    """
    stochastic = weight is not None and rounding.is_stochastic(x.dtype, weight.dtype)
    fusible = weight is not None and fuses(x.dtype, weight.dtype)
    tokens = x.numel() // max(x.shape[-1], 1)
    problem = problem_of(bases, x.dtype, tokens, out_features, x.shape[-1], lam.shape, fusible, x.requires_grad)
    tensors = (*bases[:2], *bases.places, *bases.B) if isinstance(bases, SparseBases) else bases
    dtype = bases.values.dtype if isinstance(bases, SparseBases) else x.dtype
    call = _Call(scaling / unit(dtype), out_features, choose(problem), isinstance(bases, GroupedBases))
    seed = rounding.new_seed(x.device) if stochastic else None
    compute = _AdaptedLinear.apply if _is_watched(x, lam, gamma, bias) else _AdaptedLinear.forward
    return compute(x, lam, gamma, weight, bias, call, summed, seed, *tensors)


def problem_of(
    bases: Bases,
    dtype: torch.dtype,
    tokens: int,
    out_features: int,
    in_features: int,
    rank_and_bases: tuple[int, ...],
    fusible: bool,
    input_needs_grad: bool = True,
) -> Problem:
    """What the planner has to know of a call."""
    rank, num_bases = rank_and_bases
    problem = Problem(tokens, out_features, in_features, rank, num_bases, fusible, input_needs_grad)
    if isinstance(bases, SparseBases):
        return problem.with_kind("sparse", bases.density)
    if isinstance(bases, GroupedBases):
        return problem
    return problem.with_kind("split" if bases.product_dtype(dtype) != dtype else "dense")


def skips_zeros(dtype: torch.dtype, tokens: int) -> bool:
    """Whether products in ``dtype`` with very sparse bases should skip their zeros.

    In half precision not for many tokens: skipping runs in float32, and plain products are faster.
    """
    return dtype in _WIDE or tokens <= planner.rates.sparse_tokens


def can_fuse(compute: torch.dtype, weight: torch.dtype) -> bool:
    """Whether W + ΔW may be formed and rounded to nearest: in half precision that would lose small updates."""
    return compute == weight and compute in _WIDE


def fuses(compute: torch.dtype, weight: torch.dtype) -> bool:
    """Whether a call may form W + ΔW: exactly, or rounded stochastically where that was asked for."""
    return can_fuse(compute, weight) or rounding.is_stochastic(compute, weight)


def delta_weight(
    bases: Bases, lam: Tensor, gamma: Tensor, scaling: float, wide: bool, base: Tensor | None = None
) -> Tensor:
    """ΔW (+ base) of shape (out, in) in the dtype of λ, float32 or wider; ``wide`` says that out < in."""
    assert not isinstance(bases, GroupedBases)  # which are for half precision
    if isinstance(bases, DenseBases):
        bases = bases.ready(lam.dtype)
    base = None if base is None else _oriented(base, wide)
    return _oriented(bases.weight(bases.scaled(lam * scaling, gamma, lam.dtype), base), wide)


def _is_watched(*inputs: Tensor | None) -> bool:
    """Whether anybody differentiates or maps what is computed from ``inputs``; else the bookkeeping is spared."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Call(NamedTuple):
    """What a call is besides its tensors; ``scaling`` makes up for the unit of B."""

    scaling: float
    out_features: int
    plan: Plan
    is_grouped: bool


class _AdaptedLinear(torch.autograd.Function):
    """Written in differentiable operations throughout, so that it can be differentiated again, and vmapped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        lam: Tensor,
        gamma: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        call: _Call,
        summed: Tensor | None,
        seed: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        if summed is not None:
            return F.linear(x, summed, bias)
        wide = call.out_features < x.shape[-1]
        with _without_autocast(x.device.type):
            x2 = x.reshape(-1, x.shape[-1])  # (T, in)
            if call.is_grouped:
                adapted = _adapted(tensors, lam, gamma, weight, x, call, seed)
                y = adapted.output(x2, call.plan.output, bias)
                return y.reshape(*x.shape[:-1], call.out_features)
            bases = _bases(tensors, x.dtype, gamma)
            At = bases.scaled(lam * call.scaling, gamma, x.dtype)
            if call.plan.output == "fused" and weight is not None:
                y = F.linear(x2, _oriented(_sum(bases, At, _oriented(weight, wide), seed), wide), bias)
            else:
                update = _update(x2, bases, At, wide, call.plan.output)
                y = _with_base(update, x2, weight if weight is None else weight.T, bias)
        return y.reshape(*x.shape[:-1], call.out_features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, lam, gamma, weight, bias, call, summed, seed, *tensors = inputs
        ctx.save_for_backward(x, lam, gamma, weight, summed, seed, *tensors)
        ctx.call, ctx.bias_dtype = call, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lam, gamma, weight, summed, seed, *tensors = ctx.saved_tensors
        scaling, out_features, plan, is_grouped = ctx.call
        wide = out_features < x.shape[-1]
        with _without_autocast(x.device.type):
            g2 = grads[0].reshape(-1, out_features)  # (T, out)
            x2 = x.reshape(-1, x.shape[-1])  # (T, in)
            needs_x = ctx.needs_input_grad[0]
            by_plan = needs_x and summed is None
            if is_grouped:
                adapted = _adapted(tensors, lam, gamma, weight, x, ctx.call, seed)
                dx, d_lam, d_gamma = adapted.gradients(x2, g2, plan, by_plan)
            else:
                bases = _bases(tensors, x.dtype, gamma)
                At = bases.scaled(lam * scaling, gamma, x.dtype)
                dx, dAt = _gradients(x2, g2, bases, At, weight, wide, plan, by_plan, seed)
                d_lam, d_gamma = bases.scaling_gradients(dAt, lam, gamma)
            if needs_x and summed is not None:
                dx = g2 @ summed
            d_bias = g2.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
        dx = dx if dx is None else dx.reshape(x.shape)
        d_lam, d_gamma = (d_lam * scaling).to(lam.dtype), (d_gamma * scaling).to(gamma.dtype)
        return dx, d_lam, d_gamma, None, d_bias, None, None, None, *(None for _ in tensors)


Update = Tensor | tuple[Tensor, Tensor]
"""A matrix, or two factors whose product is still to be taken."""


def _bases(tensors: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype, gamma: Tensor) -> DenseBases | SparseBases:
    if len(tensors) == len(DenseBases._fields):
        return DenseBases(*tensors).ready(dtype)
    places, B = (Csr(*tensors[start : start + len(Csr._fields)]) for start in (2, 2 + len(Csr._fields)))
    return SparseBases(tensors[0], tensors[1], places, B, gamma.shape[1])


def _adapted(
    tensors: tuple[Tensor, ...] | list[Tensor],
    lam: Tensor,
    gamma: Tensor,
    weight: Tensor | None,
    x: Tensor,
    call: _Call,
    seed: Tensor | None,
) -> Adapted:
    weight = None if weight is None else weight.to(x.dtype)
    parameters = torch.promote_types(lam.dtype, torch.float32)
    lam, gamma = lam.to(parameters), gamma.to(parameters)
    wide, kernels = call.out_features < x.shape[-1], dispatch.kernels(x.device, x.dtype)
    return Adapted(GroupedBases(*tensors), lam, gamma, call.scaling, weight, wide, seed, kernels)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Products run in the dtype of their operands, which the caller has chosen."""
    if device_type in _WITHOUT_AUTOCAST:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _oriented(update: Tensor, wide: bool) -> Tensor:  # (M, m) <-> (out, in)
    return update.T if wide else update


def _sum(bases: DenseBases | SparseBases, At: Tensor, weight: Tensor, seed: Tensor | None) -> Tensor:
    """B Ã + W, (M, m) as ``weight``."""
    if seed is None:
        return bases.weight(At, weight)
    return rounding.stochastic(bases.weight(At).float() + weight.float(), seed)


def _update(rows: Tensor, bases: DenseBases | SparseBases, At: Tensor, to_narrow: bool, way: str) -> Update:
    """Rows times ΔW: rows (T, m) times (B Ã)ᵀ, or ``to_narrow`` rows (T, M) times B Ã."""
    if way != "token":
        weight = bases.weight(At).to(rows.dtype)
        return rows, weight if to_narrow else weight.T
    if isinstance(bases, SparseBases):
        return bases.gather(rows, At) if to_narrow else bases.spread(rows, At)
    return (product(rows, bases.B), At) if to_narrow else (rows @ At.T, bases.B.T)


def _with_base(update: Update, rows: Tensor, matrix: Tensor | None, bias: Tensor | None) -> Tensor:
    """``rows @ matrix + bias + update``; the sum of products in half precision is rounded once."""
    if matrix is None:
        return update.to(rows.dtype) if isinstance(update, Tensor) else product(*update)
    matrix, bias = matrix.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    if rows.dtype not in _WIDE:
        if isinstance(update, Tensor):
            return sum_of_products([(rows, matrix)], bias, update)
        return sum_of_products([(rows, matrix), update], bias)
    base = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
    return base + update if isinstance(update, Tensor) else product(*update, base)


def _gradients(
    x: Tensor,
    g: Tensor,
    bases: DenseBases | SparseBases,
    At: Tensor,
    weight: Tensor | None,
    wide: bool,
    plan: Plan,
    needs_x: bool,
    seed: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """dx (T, in) and dÃ."""
    u, v = (x, g) if wide else (g, x)
    shared: Update | None = None  # dx's part, where it falls off on the way to dÃ
    if plan.grad_basis == "weight":
        dAt = bases.basis_gradient(u, v)
    elif isinstance(bases, DenseBases):
        projected = product(u, bases.B)  # (T, q)
        dAt = projected.T @ v
        shared = None if wide else (projected, At)
    else:
        shares = needs_x and not wide and plan.grad_input == "token"
        shared, dAt = bases.token_gradients(u, v, At, shares)
    if not needs_x:
        return None, dAt
    if plan.grad_input == "fused" and weight is not None:
        return g @ _oriented(_sum(bases, At, _oriented(weight, wide), seed), wide), dAt
    if plan.grad_input != "token" or shared is None:
        shared = _update(g, bases, At, not wide, plan.grad_input)
    return _with_base(shared, g, weight, None), dAt
