"""The adapted linear layer as one differentiable function.

Names follow the paper: A (r, m) and B (M, q) are the frozen bases with q = n·r, Ã = (s·λ)·A·γ of shape (q, m), and
ΔW = B Ã, transposed where out < in. Only x, λ, γ (and references to the frozen A, B, W) are kept for the backward;
Ã and ΔW are temporaries of one call. ``naive.py`` computes the same plainly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from randlora.ops import plan as planner
from randlora.ops import rounding
from randlora.ops.operands import Beside, Operands
from randlora.ops.plan import Plan, Problem, choose
from randlora.ops.precision import WIDE, autocasts, without_autocast
from randlora.ops.prepared import Prepared


def adapted_linear(
    x: Tensor,  # (..., in)
    operands: Operands,
    lam: Tensor,  # (r, n)
    gamma: Tensor,  # (n, m)
    scaling: float,
    out_features: int,
    weight: Tensor | None = None,  # (out, in)
    bias: Tensor | None = None,  # (out,)
    update: Tensor | None = None,  # (out, in)
    plan: Plan | None = None,
) -> Tensor:  # (..., out)
    """Return x (W + ΔW)ᵀ + bias, or x ΔWᵀ alone where no ``weight`` is given, in the dtype of x.

    The output is differentiable in x, λ, γ and bias, any number of times; ``weight`` is taken as frozen. A caller that
    has ΔW already passes it as ``update``, for output and dx. Without a ``plan``, the call takes the cheapest exact
    one (``plan.choose``).
    """
    if plan is None:
        fusible = weight is not None and fuses(x.dtype, weight.dtype)
        tokens = x.numel() // max(x.shape[-1], 1)
        plan = choose(problem_of(operands, tokens, out_features, x.shape[-1], fusible, x.requires_grad))
    prepared = Prepared(operands.scaled_by(scaling), plan, out_features)
    return prepared_linear(x, prepared, lam, gamma, weight, bias, update)


def prepared_linear(
    x: Tensor,  # (..., in)
    prepared: Prepared,
    lam: Tensor,  # (r, n)
    gamma: Tensor,  # (n, m)
    weight: Tensor | None = None,  # (out, in)
    bias: Tensor | None = None,  # (out,)
    update: Tensor | None = None,  # (out, in)
) -> Tensor:  # (..., out)
    """Return the output of :func:`adapted_linear`, for a prepared call."""
    stochastic = rounding._stochastic and weight is not None and rounding.is_stochastic(x.dtype, weight.dtype)
    seed = rounding.new_seed(x.device) if stochastic else None
    plain = _is_plain_autograd()
    if torch.is_grad_enabled() and (
        x.requires_grad or lam.requires_grad or gamma.requires_grad or (bias is not None and bias.requires_grad)
    ):
        if plain:
            return _apply(unwrap_if_dead(x), lam, gamma, weight, bias, seed, (prepared, update))
    elif plain or torch.compiler.is_compiling():  # neither differentiated nor mapped: needs no bookkeeping
        return _output(x, prepared, lam, gamma, weight, bias, update, seed)
    operands = prepared.operands
    shape = _Shape(type(operands), operands.static(), prepared.plan, prepared.out_features)
    return _Transformable.apply(x, lam, gamma, weight, bias, seed, update, shape, *operands.tensors())


def problem_of(
    operands: Operands,
    tokens: int,
    out_features: int,
    in_features: int,
    fusible: bool,
    input_needs_grad: bool = True,
) -> Problem:
    """Return the description of a call from which the planner chooses."""
    return Problem(tokens, out_features, in_features, operands.costs(tokens), fusible, input_needs_grad)


def can_fuse(compute: torch.dtype, weight: torch.dtype) -> bool:
    """Return whether W + ΔW may be rounded to nearest: in half precision that would lose small updates."""
    return compute == weight and compute in WIDE


def fuses(compute: torch.dtype, weight: torch.dtype) -> bool:
    """Return whether a call may form W + ΔW: exactly, or, on request, rounded stochastically."""
    return can_fuse(compute, weight) or rounding.is_stochastic(compute, weight)


def delta_weight(
    operands: Operands, lam: Tensor, gamma: Tensor, scaling: float, wide: bool, base: Tensor | None = None
) -> Tensor:
    """Return ΔW (+ base) of shape (out, in) in the dtype of the operands; ``wide`` says that out < in."""
    operands = operands.ready().scaled_by(scaling)
    base = None if base is None else _oriented(base, wide)
    return _oriented(operands.weight(operands.scaled(lam, gamma), base), wide)


def with_update(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    update: Tensor,  # (out, in)
    bias: Tensor | None = None,  # (out,)
) -> Tensor:  # (..., out)
    """Return x (W + ΔW)ᵀ + bias for a given ΔW, in float32 or wider.

    For few tokens two products cost less than forming the sum.
    """
    if x.numel() <= planner.rates_on(x.device).element * x.shape[-1]:
        return F.linear(x, weight, bias) + F.linear(x, update)
    return F.linear(x, weight + update, bias)


def _undifferentiated(update: Tensor | None) -> Tensor | None:
    """Return a kept update for the backward; ``None`` in a double backward, which differentiates dx in λ and γ."""
    return None if torch.is_grad_enabled() else update


def _is_plain_autograd() -> bool:
    """Return whether at most eager autograd is active: no compiler, no transform, no forward mode."""
    if torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


class _Shape(NamedTuple):
    """A prepared call without its operands' tensors, which are passed one by one."""

    kind: type[Operands]
    static: tuple[Any, ...]
    plan: Plan
    out_features: int

    def prepared(self, tensors: tuple[Tensor, ...]) -> Prepared:
        """Return the call with the operands of these tensors."""
        return Prepared(self.kind.of(tensors, self.static), self.plan, self.out_features)


class _Adapted(torch.autograd.Function):
    """The function for eager autograd. It lacks ``setup_context``, for which torch binds a signature at each call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lam: Tensor,
        gamma: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        rest: tuple[Prepared, Tensor | None],
    ) -> Tensor:
        ctx.save_for_backward(x, lam, gamma, weight, seed)
        # not saved with the tensors: checkpointing counts those, and its second forward may find a newly held update
        ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype
        prepared, update = rest
        return _output(x, prepared, lam, gamma, weight, bias, update, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lam, gamma, weight, seed = ctx.saved_tensors
        prepared, update = ctx.rest
        saved = (grads[0], x, lam, gamma, weight, _undifferentiated(update), seed)
        return *_gradients(*saved, prepared, ctx.bias_dtype, ctx.needs_input_grad), None, None


_apply = super(torch.autograd.Function, _Adapted).apply
"""``_Adapted.apply`` without its search for transforms and its pass over the arguments."""
unwrap_if_dead = torch._C._functorch.unwrap_if_dead
"""Unwrapping of a tensor that has outlived its transform."""


class _Transformable(torch.autograd.Function):
    """The function for compilers and torch's function transforms, which have to see every tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        lam: Tensor,
        gamma: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        update: Tensor | None,
        shape: _Shape,
        *tensors: Tensor,
    ) -> Tensor:
        return _output(x, shape.prepared(tensors), lam, gamma, weight, bias, update, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, lam, gamma, weight, bias, seed, update, shape, *tensors = inputs
        ctx.save_for_backward(x, lam, gamma, weight, seed, *tensors)
        ctx.update = update
        ctx.shape, ctx.bias_dtype = shape, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lam, gamma, weight, seed, *tensors = ctx.saved_tensors
        saved = (grads[0], x, lam, gamma, weight, _undifferentiated(ctx.update), seed)
        found = _gradients(*saved, ctx.shape.prepared(tuple(tensors)), ctx.bias_dtype, ctx.needs_input_grad)
        return *found, None, None, None, *(None for _ in tensors)


def _output(
    x: Tensor,
    prepared: Prepared,
    lam: Tensor,
    gamma: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    update: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    if update is not None and weight is not None:
        return with_update(x, weight, update, bias)
    if autocasts(x.device.type):
        with without_autocast(x.device.type):
            return _output(x, prepared, lam, gamma, weight, bias, update, seed)
    operands, plan, out_features = prepared
    wide = out_features < x.shape[-1]
    operands = operands.ready()
    x2 = _rows(x)
    scaled = operands.scaled(lam, gamma)
    if plan.output == "fused" and weight is not None:
        y = F.linear(x2, _oriented(operands.weight(scaled, _oriented(weight, wide), seed), wide), bias)
    else:
        beside = None if weight is None else _beside(x2, weight.T, bias)
        y = _times_update(x2, operands, scaled, wide, plan.output, beside)
    return y if x2 is x else y.reshape(*x.shape[:-1], out_features)


def _gradients(
    grad: Tensor,
    x: Tensor,
    lam: Tensor,
    gamma: Tensor,
    weight: Tensor | None,
    update: Tensor | None,
    seed: Tensor | None,
    prepared: Prepared,
    bias_dtype: torch.dtype | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return dx, dλ, dγ, ``None`` for the weight, and the gradient of the bias."""
    if autocasts(grad.device.type):
        with without_autocast(grad.device.type):
            saved = (x, lam, gamma, weight, update, seed)
            return _gradients(grad, *saved, prepared, bias_dtype, needed)
    operands, plan, out_features = prepared
    wide = out_features < x.shape[-1]
    operands = operands.ready()
    g2, x2 = _rows(grad), _rows(x)
    u, v = (x2, g2) if wide else (g2, x2)
    by_plan = needed[0] and update is None
    scaled = operands.scaled(lam, gamma) if by_plan else None
    projected = None
    if plan.grad_basis == "weight":
        d_lam, d_gamma = operands.from_weight(u.T @ v, lam, gamma)
    else:  # dx needs the same projection of dy
        shares = by_plan and not wide and plan.grad_input == "token"
        projected, d_lam, d_gamma = operands.from_tokens(u, v, lam, gamma, scaled if shares else None)
        projected = projected if shares else None
    dx = None
    if by_plan and plan.grad_input == "fused" and weight is not None:
        dx = g2 @ _oriented(operands.weight(scaled, _oriented(weight, wide), seed), wide)
    elif by_plan:
        beside = None if weight is None else _beside(g2, weight, None)
        dx = _times_update(g2, operands, scaled, not wide, plan.grad_input, beside, projected)
    elif needed[0] and update is not None and weight is not None:
        dx = with_update(g2, weight.T, update.T)
    dx = dx if dx is None or x2 is x else dx.reshape(x.shape)
    d_bias = g2.sum(0).to(bias_dtype) if needed[4] else None
    return dx, _in(d_lam, lam.dtype), _in(d_gamma, gamma.dtype), None, d_bias


def _rows(x: Tensor) -> Tensor:  # (..., k) -> (T, k)
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``, skipping the call if it has nothing to do: it takes as long as a small product."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _oriented(update: Tensor, wide: bool) -> Tensor:  # (M, m) <-> (out, in)
    return update.T if wide else update


def _beside(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Beside:
    """Return the product of ``rows`` with the base layer's matrix, in the dtype of the rows."""
    return Beside(rows, _in(matrix, rows.dtype), None if bias is None else _in(bias, rows.dtype))


def _times_update(
    rows: Tensor,
    operands: Operands,
    scaled: Any,
    to_narrow: bool,
    way: str,
    beside: Beside | None,
    projected: Any = None,
) -> Tensor:
    """Return rows times ΔW and the base weight: (T, m) to (T, M), or ``to_narrow`` (T, M) to (T, m)."""
    if way != "token":
        update = operands.weight(scaled)
        return operands.times(rows, update if to_narrow else update.T, beside)
    if not to_narrow:
        return operands.widen(rows, scaled, beside)
    return operands.narrow(operands.project(rows, scaled) if projected is None else projected, scaled, beside)
