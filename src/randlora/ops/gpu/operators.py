"""The kernels as operators of torch, with the signatures of their twins in ``reference.py``.

Operators are opaque to ``torch.compile``, which needs only the shapes of their results, and take no time of it. Their
derivatives, and so all second derivatives of a layer, are those of the twins. Importing this file needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from randlora.ops.gpu import gradients, products, reference


@torch.library.custom_op("randlora::times_scaled", mutates_args=())
def times_scaled(
    x: Tensor,
    A: Tensor,
    lam: Tensor,
    gamma: Tensor,
    dtype: torch.dtype,
    base: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """As ``reference.times_scaled``."""
    out = _like(base, x, x.shape[0], gamma.shape[1], dtype)
    first = None if a is None or b is None else (a, b)
    products.times_scaled(x, A, lam.contiguous(), gamma.contiguous(), out, base, first, bias, seed)
    return out


@times_scaled.register_fake
def _(
    x: Tensor,
    A: Tensor,
    lam: Tensor,
    gamma: Tensor,
    dtype: torch.dtype,
    base: Tensor | None = None,
    *_others: Tensor | None,
) -> Tensor:
    return _like(base, x, x.shape[0], gamma.shape[1], dtype)


@torch.library.custom_op("randlora::times_scaled_transposed", mutates_args=())
def times_scaled_transposed(v: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    """As ``reference.times_scaled_transposed``."""
    out = v.new_empty(v.shape[0], lam.numel())
    products.times_scaled_transposed(v, A, lam.contiguous(), gamma.contiguous(), out)
    return out


@times_scaled_transposed.register_fake
def _(v: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], lam.numel())


@torch.library.custom_op("randlora::sum_of_products", mutates_args=())
def sum_of_products(
    a: Tensor, b: Tensor, c: Tensor | None = None, d: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """As ``reference.sum_of_products``."""
    out = a.new_empty(a.shape[0], b.shape[1])
    products.sum_of_products(out, (a, b), None if c is None or d is None else (c, d), bias)
    return out


@sum_of_products.register_fake
def _(a: Tensor, b: Tensor, *_others: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("randlora::scaling_gradients", mutates_args=())
def scaling_gradients(left: Tensor, right: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.scaling_gradients``."""
    return gradients.scaling_gradients(left, right, A, lam.contiguous(), gamma.contiguous())


@scaling_gradients.register_fake
def _(left: Tensor, right: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return lam.new_empty(lam.shape), gamma.new_empty(gamma.shape)


def _like(base: Tensor | None, x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An empty matrix in the memory order of the base."""
    if base is not None and base.stride(1) != 1:
        return x.new_empty(columns, rows, dtype=dtype).T
    return x.new_empty(rows, columns, dtype=dtype)


def _follow(op: Any, twin: Callable[..., Any]) -> None:
    """Gives an operator the derivatives of its twin, and a vmap that runs it once per sample."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        inputs = [saved if other is None else other for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        watched = [number for number, needed in enumerate(ctx.needs_input_grad) if needed]

        def of_watched(*values: Tensor) -> Any:
            full = list(inputs)
            for number, value in zip(watched, values, strict=True):
                full[number] = value
            return twin(*full)

        _, pull, *_ = torch.func.vjp(of_watched, *(inputs[number] for number in watched))
        found = dict(zip(watched, pull(grads if len(grads) > 1 else grads[0]), strict=True))
        return tuple(found.get(number) for number in range(len(inputs)))

    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        samples = [
            op(*(v if d is None else v.select(d, i) for v, d in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0, 0)

    op.register_autograd(backward, setup_context=setup_context)
    op.register_vmap(vmap)


_follow(times_scaled, reference.times_scaled)
_follow(times_scaled_transposed, reference.times_scaled_transposed)
_follow(sum_of_products, reference.sum_of_products)
_follow(scaling_gradients, reference.scaling_gradients)
