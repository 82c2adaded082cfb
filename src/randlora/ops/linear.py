"""The adapted linear layer as one differentiable function.

Names follow the paper: A (r, m) and B (M, q) are the frozen bases with q = n·r, Ã = (s·λ)·A·γ of shape (q, m), and
ΔW = B Ã, transposed where out < in. Only x, λ, γ (and references to the frozen A, B, W) are kept for the backward;
Ã and ΔW are temporaries of one call. ``naive.py`` is the plain twin.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from randlora.ops.plan import Plan, Problem, choose


def adapted_linear(
    x: Tensor,  # (..., in)
    A: Tensor,  # (r, m), dtype of x
    B: Tensor,  # (M, q), dtype of x
    lam: Tensor,  # (r, n)
    gamma: Tensor,  # (n, m)
    scaling: float,
    out_features: int,
    weight: Tensor | None = None,  # (out, in)
    bias: Tensor | None = None,  # (out,)
) -> Tensor:  # (..., out)
    """X (W + ΔW)ᵀ + bias, or x ΔWᵀ alone where no ``weight`` is given, in the dtype of x.

    The way of computing it is the cheapest that is exact (``plan.choose``). Differentiable in x, λ, γ and bias, any
    number of times; ``weight`` is taken as frozen.
    """
    problem = Problem(
        tokens=x.numel() // max(x.shape[-1], 1),
        out_features=out_features,
        in_features=x.shape[-1],
        rank=lam.shape[0],
        num_bases=lam.shape[1],
        can_fuse=weight is not None and can_fuse(x.dtype, weight.dtype),
        input_needs_grad=x.requires_grad,
    )
    return _AdaptedLinear.apply(x, A, B, lam, gamma, scaling, out_features, weight, bias, choose(problem))


def can_fuse(compute: torch.dtype, weight: torch.dtype) -> bool:
    """Whether W + ΔW may be formed: in half precision it would round small updates away."""
    return compute == weight and compute in (torch.float32, torch.float64)


def scaled_basis(A: Tensor, lam: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:  # (q, m)
    """Ã = λ·A·γ, rows ordered over (r, n), formed in the wider of the dtypes and returned in ``dtype``."""
    scaled = torch.mul(lam.unsqueeze(-1), A.unsqueeze(1))  # (r, n, m)
    return (scaled * gamma).flatten(0, 1).to(dtype)


def delta_weight(A: Tensor, B: Tensor, lam: Tensor, gamma: Tensor, scaling: float, wide: bool) -> Tensor:
    """ΔW of shape (out, in) in the dtype of B; ``wide`` says that out < in."""
    return _oriented(B @ scaled_basis(A, lam * scaling, gamma, B.dtype), wide)


class _AdaptedLinear(torch.autograd.Function):
    """Written in differentiable operations throughout, so that it can be differentiated again, and vmapped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        A: Tensor,
        B: Tensor,
        lam: Tensor,
        gamma: Tensor,
        scaling: float,
        out_features: int,
        weight: Tensor | None,
        bias: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        wide = out_features < x.shape[-1]
        with _without_autocast(x.device.type):
            At = scaled_basis(A, lam * scaling, gamma, x.dtype)
            if plan.forward == "fused" and weight is not None:
                return F.linear(x, _sum_weight(weight, B, At, wide), bias)
            x2 = x.reshape(-1, x.shape[-1])  # (T, in)
            if plan.forward == "token":
                first, second = (x2 @ B, At) if wide else (x2 @ At.T, B.T)
            else:
                first, second = x2, _oriented(B @ At, wide).T
            if weight is None:
                y = first @ second
            else:
                base = F.linear(x2, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
                y = torch.addmm(base, first, second)  # one rounding of the sum in half precision
            return y.reshape(*x.shape[:-1], out_features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, A, B, lam, gamma, scaling, out_features, weight, bias, plan = inputs
        ctx.save_for_backward(x, A, B, lam, gamma, weight)
        ctx.scaling, ctx.wide, ctx.plan = scaling, out_features < x.shape[-1], plan
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, lam, gamma, weight = ctx.saved_tensors
        needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[8]
        with _without_autocast(x.device.type):
            g2 = grads[0].reshape(-1, grads[0].shape[-1])  # (T, out)
            x2 = x.reshape(-1, x.shape[-1])  # (T, in)
            At = scaled_basis(A, lam * ctx.scaling, gamma, x.dtype)
            if ctx.plan.backward == "token":
                dAt, dx = _token_gradients(x2, g2, B, At, weight, ctx.wide, needs_x)
            else:
                fused = ctx.plan.backward == "fused"
                dAt, dx = _weight_gradients(x2, g2, B, At, weight, ctx.wide, needs_x, fused)
            d_lam, d_gamma = _scaling_gradients(dAt, A, lam, gamma, ctx.scaling)
            d_bias = g2.sum(0).to(ctx.bias_dtype) if needs_bias else None
        dx = dx if dx is None else dx.reshape(x.shape)
        return dx, None, None, d_lam, d_gamma, None, None, None, d_bias, None


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Products run in the dtype of their operands, which the caller has chosen."""
    if not torch.amp.is_autocast_available(device_type):  # the meta device, for one
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _oriented(update: Tensor, wide: bool) -> Tensor:  # (M, m) -> (out, in)
    return update.T if wide else update


def _sum_weight(weight: Tensor, B: Tensor, At: Tensor, wide: bool) -> Tensor:  # (out, in)
    """W + ΔW in one pass over W."""
    return torch.addmm(weight, At.T, B.T) if wide else torch.addmm(weight, B, At)


def _token_gradients(
    x: Tensor,
    g: Tensor,
    B: Tensor,
    At: Tensor,
    weight: Tensor | None,
    wide: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor | None]:
    """dÃ (q, m) and dx (T, in) without forming ΔW."""
    if wide:
        dAt = (x @ B).T @ g
        dx = g @ At.T @ B.T if needs_x else None
    else:
        dH = g @ B
        dAt = dH.T @ x
        dx = dH @ At if needs_x else None
    if dx is not None and weight is not None:
        dx = torch.addmm(dx, g, weight.to(g.dtype))
    return dAt, dx


def _weight_gradients(
    x: Tensor, g: Tensor, B: Tensor, At: Tensor, weight: Tensor | None, wide: bool, needs_x: bool, fused: bool
) -> tuple[Tensor, Tensor | None]:
    """dÃ (q, m) and dx (T, in) through the gradient of the weight and a rebuilt ΔW."""
    dAt = B.T @ (x.T @ g if wide else g.T @ x)
    if not needs_x:
        return dAt, None
    if fused and weight is not None:
        return dAt, g @ _sum_weight(weight, B, At, wide)
    dx = g @ _oriented(B @ At, wide)
    return dAt, dx if weight is None else torch.addmm(dx, g, weight.to(g.dtype))


def _scaling_gradients(dAt: Tensor, A: Tensor, lam: Tensor, gamma: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dλ (r, n) and dγ (n, m) from dÃ, summed in the wider of the dtypes."""
    r, n = lam.shape
    wide_dtype = torch.promote_types(lam.dtype, dAt.dtype)
    product = dAt.view(r, n, -1).to(wide_dtype) * (A.unsqueeze(1) * scaling)  # (r, n, m)
    d_lam = torch.einsum("rnm,nm->rn", product, gamma.to(wide_dtype))
    d_gamma = torch.einsum("rnm,rn->nm", product, lam.to(wide_dtype))
    return d_lam.to(lam.dtype), d_gamma.to(gamma.dtype)
