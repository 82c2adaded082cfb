"""Each kernel on the layers of the model: checked against its twin, then timed beside torch and the floor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randlora.ops.bases.dense import DenseBases
from randlora.ops.gpu import availability, reference
from randlora.ops.gpu.grouped import grouped

from .gpu_clock import Rates, milliseconds

TOLERANCE = 2e-2  # of the norm, beside float32


@dataclass(frozen=True)
class Trial:
    """One product on one layer: by the kernel, by its twin, by torch without kernels; and what it needs at least."""

    name: str
    kernel: Callable[[], Any]
    twin: Callable[[], Any]
    plain: Callable[[], Any]
    multiply_adds: float
    nbytes: float


def run(
    device: torch.device, rates: Rates, shapes: list[tuple[int, int]], tokens: int, rank: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row for each kernel and shape (M, m)."""
    for M, m in shapes:
        for trial in trials(device, M, m, tokens, rank):
            error = _error(trial.kernel(), trial.twin())
            if not error <= TOLERANCE:
                raise RuntimeError(f"{trial.name} on {M}×{m}: relative error {error:.1e} beside its twin")
            time = milliseconds(trial.kernel, device, rounds)
            floor = rates.floor(trial.multiply_adds, trial.nbytes)
            yield {
                "kernel": trial.name,
                "layer": f"{M}×{m}",
                "tokens": tokens,
                "ms": time,
                "torch ms": milliseconds(trial.plain, device, rounds),
                "floor ms": floor,
                "of the floor's rate": floor / time,
                "error": error,
            }


def trials(device: torch.device, M: int, m: int, T: int, r: int) -> list[Trial]:
    n, dtype = -(-m // r), torch.bfloat16
    q = n * r

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    A, natural, W, x, u, h = draw(r, m), draw(M, q) / q**0.5, draw(M, m), draw(T, m), draw(T, M), draw(T, q)
    lam, gamma = torch.randn(r, n, device=device), torch.randn(n, m, device=device)
    B, plain, kernels = (
        grouped(natural, r),
        DenseBases(A.unsqueeze(1), natural, dtype),
        availability.kernels(device, dtype),
    )
    factors = (A, lam, gamma)
    two, small = 2, 4 * (lam.numel() + gamma.numel()) + 2 * A.numel()  # bytes of an entry; of what Ã is made of

    def product(name: str, rows: int, left: Tensor, base: Tensor | None, *first: Tensor) -> Trial:
        arguments: tuple[Any, ...] = (left, *factors, dtype, base, *first)
        pairs = rows * q * m + (first[0].numel() * m if first else 0)
        traffic = small + two * (left.numel() + rows * m * (1 if base is None else 2))
        traffic += two * sum(factor.numel() for factor in first)

        def without() -> Tensor:
            total = left @ plain.scaled(lam, gamma)
            total = total if base is None else total + base
            return torch.addmm(total, *first) if first else total

        return Trial(
            name,
            lambda: kernels.times_scaled(*arguments),
            lambda: reference.times_scaled(*arguments),
            without,
            pairs,
            traffic,
        )

    def gradients(name: str, left: Tensor, right: Tensor, natural_left: Tensor) -> Trial:
        return Trial(
            name,
            lambda: kernels.scaling_gradients(left, right, *factors),
            lambda: reference.scaling_gradients(left, right, *factors),
            lambda: plain._gradients(natural_left.T @ right, lam, gamma),
            len(right) * q * m,
            two * (left.numel() + right.numel()) + 2 * small,
        )

    return [
        product("W + ΔW", M, B, W),
        product("ΔW", M, B, None),
        product("tokens Ã + u W", T, h, None, u, W),
        Trial(
            "tokens Ãᵀ",
            lambda: kernels.times_scaled_transposed(x, *factors),
            lambda: reference.times_scaled_transposed(x, *factors),
            lambda: x @ plain.scaled(lam, gamma).T,
            T * q * m,
            small + two * (x.numel() + T * q),
        ),
        Trial(
            "x Wᵀ + h Bᵀ",
            lambda: kernels.sum_of_products(x, W.T, h, B.T),
            lambda: reference.sum_of_products(x, W.T, h, B.T),
            lambda: torch.cat([x, h], 1) @ torch.cat([W.T, natural.T], 0),
            T * M * (m + q),
            two * (x.numel() + W.numel() + h.numel() + B.numel() + T * M),
        ),
        gradients("dλ, dγ from dW", B, W, natural),
        gradients("dλ, dγ from tokens", h, x, h),
    ]


def _error(found: Any, expected: Any) -> float:
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    return max(float((mine.float() - theirs.float()).norm() / theirs.float().norm()) for mine, theirs in pairs)
