"""The steps of an adapted layer on the device, checked against torch without kernels, then timed beside it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randlora.ops import rounding
from randlora.ops.bases.dense import DenseBases
from randlora.ops.bf16 import sum_of_products
from randlora.ops.gpu import availability

from .gpu_clock import Rates, milliseconds

WRONG = "wrong"
TOLERANCE = 3e-2  # of the norm: both round to bf16 on the way


@dataclass(frozen=True)
class Trial:
    """One step on one layer, and the least work and traffic of the step."""

    name: str
    work: Callable[[], Any]
    multiply_adds: float
    nbytes: float


def run(
    device: torch.device, rates: Rates, shapes: list[tuple[int, int]], tokens: int, rank: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each step and shape (M, m)."""
    for M, m in shapes:
        for trial in trials(device, M, m, tokens, rank):
            found, time = trial.work(), milliseconds(trial.work, device, rounds)
            availability.set_kernels(False)
            try:
                expected, plain = trial.work(), milliseconds(trial.work, device, rounds)
            finally:
                availability.set_kernels(True)
            error = _error(found, expected)
            floor = rates.floor(trial.multiply_adds, trial.nbytes)
            yield {
                "step": trial.name,
                "layer": f"{M}×{m}",
                "tokens": tokens,
                "ms": time,
                "torch ms": plain,
                "floor ms": floor,
                "of the floor's rate": floor / time,
                "error": error,
                "note": None if error <= TOLERANCE else f"{WRONG}: beside torch's result",
            }


def trials(device: torch.device, M: int, m: int, T: int, r: int) -> list[Trial]:
    n, dtype = -(-m // r), torch.bfloat16
    q = n * r

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    A, B, W, x, h = draw(r, 1, m), draw(M, q) / q**0.5, draw(M, m), draw(T, m), draw(T, q)
    lam, gamma = torch.randn(r, n, device=device), torch.randn(n, m, device=device)
    bases, factors = DenseBases(A, B, dtype), (lam, gamma)
    scaled, d_weight = bases.scaled(*factors), draw(M, m)
    d_scaled, update = B.T @ d_weight, bases.weight(scaled)
    seed = torch.ones(1, dtype=torch.int32, device=device)
    small, entry = 4 * (lam.numel() + gamma.numel()) + 2 * A.numel(), 2  # bytes of what Ã is made of; of an entry
    return [
        Trial("Ã", lambda: bases.scaled(*factors), 0, small + entry * q * m),
        Trial("ΔW", lambda: bases.weight(bases.scaled(*factors)), q * m * M, small + entry * (M * q + M * m)),
        Trial("tokens Ãᵀ", lambda: x @ bases.scaled(*factors).T, T * q * m, small + entry * T * (m + q)),
        Trial(
            "x Wᵀ + h Bᵀ",
            lambda: sum_of_products([(x, W.T), (h, B.T)], None),
            T * M * (m + q),
            entry * (T * (m + q + M) + M * (m + q)),
        ),
        Trial("dλ, dγ from dÃ", lambda: bases._gradients(d_scaled, *factors), 0, 2 * small + entry * q * m),
        Trial("dλ, dγ from dW", lambda: bases.from_weight(d_weight, *factors), q * m * M, entry * (M * q + M * m)),
        Trial(
            "dλ, dγ from tokens",
            lambda: bases._gradients(h.T @ x, *factors),
            T * q * m,
            2 * small + entry * T * (m + q),
        ),
        Trial("W + ΔW, stochastic", lambda: rounding.stochastic_sum(update, W, seed), 0, 3 * entry * M * m),
    ]


def _error(found: Any, expected: Any) -> float:
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    return max(float((mine.float() - theirs.float()).norm() / theirs.float().norm()) for mine, theirs in pairs)
