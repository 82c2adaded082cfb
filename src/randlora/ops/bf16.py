"""Products on bfloat16 matrix units that keep float32's precision.

Dense bases are bfloat16 numbers. A float32 matrix is exactly the sum of three bfloat16 matrices, so that its product
with a basis is three bfloat16 products, accumulated in float32. They lose nothing that a float32 product would keep,
and matrix units (AMX, on CPU) take about half the time of one float32 product.

A sum of two bfloat16 products can also be rounded once. Two layers would round twice, and lose any update smaller than
half a unit of the base layer's output.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randlora.ops.gpu import availability

_PIECES = 3  # of 8 bits each, for the 24 bits of float32
_BLOCK = 1024  # rows or columns that are split at a time, so that the pieces stay in a core's cache
_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112  # of the CBLAS interface


def split_mm(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """Return ``a @ b (+ base)`` in float32, where one factor is float32 and the other a frozen bfloat16 matrix.

    Args:
        a: (i, k).
        b: (k, j).
        base: (i, j), float32.
    """
    return call(_SplitMM, torch.ops.randlora.split_mm, a, b, base)


def sum_of_products(pairs: list[tuple[Tensor, Tensor]], bias: Tensor | None, addend: Tensor | None = None) -> Tensor:
    """Return ``Σ a @ b + bias + addend`` in the half-precision dtype of the pairs, rounded once.

    Args:
        pairs: one or two of (i, k) and (k, j), of equal i and j.
        bias: (j,).
        addend: (i, j), floating point.
    """
    first, second = pairs[0], pairs[1] if len(pairs) > 1 else (None, None)
    rows, dtype, device = first[0].shape[0], first[0].dtype, first[0].device
    kernels = availability.kernels(dtype, *first, *second, addend, bias)
    if kernels is not None:
        if bias is not None:
            addend = bias.expand(rows, -1) if addend is None else addend + bias.float()
        return kernels.rounded_sum(*first, *second, addend)
    if availability.why_not(device, dtype) is None or (device.type == "cpu" and _in_blocks(dtype)):
        if bias is not None:
            addend = bias.float().expand(rows, -1) if addend is None else addend + bias.float()
        return call(_RoundedSum, torch.ops.randlora.rounded_sum, *first, *second, addend)
    if addend is not None:
        total = addend.float() if bias is None else addend + bias.float()
        for a, b in pairs:
            total = torch.addmm(total, a.float(), b.float())
        return total.to(dtype)
    # one product over the joined inner dimension accumulates in float32 on every device
    a, b = torch.cat([a for a, _ in pairs], 1), torch.cat([b for _, b in pairs], 0)
    return a @ b if bias is None else torch.addmm(bias.to(dtype), a, b)


torch.library.define("randlora::split_mm", "(Tensor a, Tensor b, Tensor? base) -> Tensor")
torch.library.define("randlora::rounded_sum", "(Tensor a, Tensor b, Tensor? c, Tensor? d, Tensor? addend) -> Tensor")


@torch.library.impl("randlora::split_mm", "CPU")
def _split_mm(a: Tensor, b: Tensor, base: Tensor | None) -> Tensor:
    out, empty = _start(base, a.shape[0], b.shape[1]), base is None
    if not a.shape[1] or not out.numel():
        return out.zero_() if empty else out
    a, b = _blas_ready(a), _blas_ready(b)
    if b.dtype == torch.bfloat16:
        for start in range(0, a.shape[0], _BLOCK):
            rows = slice(start, start + _BLOCK)
            for number, piece in enumerate(_pieces(a[rows])):
                _gemm_into(out[rows], piece, b, adds=not empty or number > 0)
    else:
        for start in range(0, b.shape[0], _BLOCK):
            rows = slice(start, start + _BLOCK)
            for number, piece in enumerate(_pieces(b[rows])):
                _gemm_into(out, a[:, rows], piece, adds=not empty or start + number > 0)
    return out


@torch.library.impl("randlora::rounded_sum", "CPU")
def _rounded_sum(a: Tensor, b: Tensor, c: Tensor | None, d: Tensor | None, addend: Tensor | None) -> Tensor:
    pairs = [(first, second) for first, second in ((a, b), (c, d)) if first is not None and second is not None]
    on_units = a.dtype == torch.bfloat16 and available
    pairs = [(first, _blas_ready(second) if on_units else second.float()) for first, second in pairs]
    out = a.new_empty(a.shape[0], b.shape[1])
    for start in range(0, a.shape[0], _BLOCK):  # so that no float32 copy of all rows is made
        rows = slice(start, start + _BLOCK)
        target = out[rows]
        total = _start(None if addend is None else addend[rows], *target.shape)
        if addend is None:
            total.zero_()
        for first, second in pairs:
            if not on_units:
                total.addmm_(first[rows].float(), second)
            elif total.numel() and first.shape[1]:
                _gemm_into(total, _blas_ready(first[rows]), second, adds=True)
        target.copy_(total)
    return out


@torch.library.impl("randlora::rounded_sum", "CUDA")
def _rounded_sum_on_gpu(a: Tensor, b: Tensor, c: Tensor | None, d: Tensor | None, addend: Tensor | None) -> Tensor:
    """Return the sum from the kernel, for compiled code, which does not call the kernel itself."""
    return availability.loaded().rounded_sum(a, b, c, d, addend)


@torch.library.register_fake("randlora::split_mm")
def _(a: Tensor, b: Tensor, base: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@torch.library.register_fake("randlora::rounded_sum")
def _(a: Tensor, b: Tensor, c: Tensor | None, d: Tensor | None, addend: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


class BySample(torch.autograd.Function):
    """An autograd function whose ``vmap`` calls it once for each sample."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Return the outputs of all samples, stacked."""
        samples = [
            [v if d is None else v.select(d, i) for v, d in zip(inputs, in_dims, strict=True)]
            for i in range(info.batch_size)
        ]
        return torch.stack([cls.apply(*sample) for sample in samples]), 0


class _SplitMM(BySample):
    @staticmethod
    def forward(a: Tensor, b: Tensor, base: Tensor | None) -> Tensor:
        return torch.ops.randlora.split_mm(a, b, base)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        d_a = split_mm(grads[0], b.T) if b.dtype == torch.bfloat16 else None
        d_b = split_mm(a.T, grads[0]) if a.dtype == torch.bfloat16 else None
        return d_a, d_b, grads[0] if ctx.needs_input_grad[2] else None


class _RoundedSum(BySample):
    @staticmethod
    def forward(a: Tensor, b: Tensor, c: Tensor | None, d: Tensor | None, addend: Tensor | None) -> Tensor:
        return torch.ops.randlora.rounded_sum(a, b, c, d, addend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, c, d = ctx.saved_tensors
        rest = (None, None) if c is None else (grads[0] @ d.T, c.T @ grads[0])
        return grads[0] @ b.T, a.T @ grads[0], *rest, grads[0].float() if ctx.needs_input_grad[4] else None


def call(function: type[BySample], op: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Return the output of ``function``, or of ``op`` without bookkeeping if nothing differentiates or maps it."""
    return op(*inputs) if torch.compiler.is_compiling() or not is_watched() else function.apply(*inputs)


def is_watched() -> bool:
    """Return whether operations may be differentiated or mapped now."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _pieces(values: Tensor) -> list[Tensor]:
    """Return bfloat16 matrices whose sum is the float32 ``values``."""
    pieces = []
    rest = values
    for _ in range(_PIECES):
        pieces.append(rest.bfloat16())
        taken = pieces[-1].float()
        rest = torch.sub(rest, taken, out=taken)
    return pieces


def _start(base: Tensor | None, rows: int, columns: int) -> Tensor:
    """Return a row-major float32 matrix to write to: a copy of ``base``, or an uninitialised matrix."""
    if base is None:
        return torch.empty(rows, columns, dtype=torch.float32, device="cpu")  # not torch's default device
    return base.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _blas_ready(matrix: Tensor) -> Tensor:
    """Return the matrix itself if BLAS can read it, as it can most views, else a copy."""
    rows, columns = matrix.stride()
    fits = (columns == 1 and rows >= matrix.shape[1]) or (rows == 1 and columns >= matrix.shape[0])
    return matrix if fits else matrix.contiguous()


def _gemm_into(out: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """Compute ``out = a @ b``, or ``+=``, for a row-major float32 ``out`` and bfloat16 matrices that BLAS can read."""
    gemm = _gemm()
    assert gemm is not None
    (i, k), j = a.shape, b.shape[1]
    a_order, a_step = _order(a)
    b_order, b_step = _order(b)
    gemm(
        *(_ROW_MAJOR, a_order, b_order, i, j, k, 1.0),
        *(a.data_ptr(), a_step, b.data_ptr(), b_step),
        *(float(adds), out.data_ptr(), out.stride(0)),
    )


def _order(matrix: Tensor) -> tuple[int, int]:
    """Return the CBLAS flag and the leading dimension of a matrix."""
    rows, columns = matrix.stride()
    if columns == 1 and rows >= matrix.shape[1]:
        return _PLAIN, rows
    return _TRANSPOSED, columns


@cache
def _gemm() -> Callable[..., None] | None:
    """Return ``cblas_gemm_bf16bf16f32`` of torch's own BLAS; ``None`` if that BLAS lacks the function."""
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            gemm = ctypes.CDLL(str(library)).cblas_gemm_bf16bf16f32
        except (OSError, AttributeError):
            continue
        integer, pointer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
        gemm.argtypes = [integer] * 6 + [real, pointer, integer, pointer, integer, real, pointer, integer]
        gemm.restype = None
        return gemm
    return None


def _available() -> bool:
    supports = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if supports is None or not supports() or _gemm() is None:
        return False
    with torch.device("cpu"):
        a, b = torch.tensor([[1.0, 2**-9]]).bfloat16(), torch.tensor([[1.0], [1.0]]).bfloat16()
        out = torch.ones(1, 1, dtype=torch.float32)
    _gemm_into(out, a, b, adds=True)
    return out.item() == 2 + 2**-9  # not rounded to bfloat16


available: bool = _available()
"""Whether this machine multiplies bfloat16 matrices in hardware and torch's BLAS gives their float32 product."""


def _is_slow(name: str) -> bool:
    """Return whether the CPU lacks instructions for products in a dtype: float32 is up to fifty times faster then."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and not supported()


_slow: dict[torch.dtype, bool] = {torch.bfloat16: _is_slow("bf16"), torch.float16: _is_slow("fp16")}


def _in_blocks(dtype: torch.dtype) -> bool:
    """Return whether sums of products on CPU are formed in float32, block by block, not by torch's own products."""
    return _slow[dtype] or (dtype == torch.bfloat16 and available)


_SMALLEST = 1 << 20  # entries of a basis below which splitting costs more than it saves


def splits(entries: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products in ``dtype`` should read a basis of that many entries as bfloat16."""
    return available and dtype == torch.float32 and device.type == "cpu" and entries >= _SMALLEST
