"""The singular values of an update, however large it is: all of them, or an estimate of how they are spread."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from randlora.analysis.update import effective_rank
from randlora.errors import ConfigError

LARGEST_EXACT = 2048
"""The smaller dimension up to which all singular values are computed."""

_STEPS, _PROBES = 64, 8
_POINTS = 64


@dataclass(frozen=True)
class Spectrum:
    """Singular values of ΔW, or of the block-diagonal matrix of several.

    Attributes:
        norm: Frobenius norm.
        effective_rank: that of the values (``update.effective_rank``).
        size: how many singular values there are.
        nonzero: how many of them are above 1e-7 of the largest: below, float32 knows nothing.
        index: at most 64 of the places 1 to ``size``.
        values: the singular values there, largest first.
        exact: whether they were computed; otherwise they are estimates: the rank, where it is not
            small, is good to a few percent, single values inside the spectrum to some tens of percent.
    """

    norm: float
    effective_rank: float
    size: int
    nonzero: int
    index: tuple[int, ...]
    values: tuple[float, ...]
    exact: bool


def spectrum(updates: Iterable[Tensor]) -> Spectrum:
    """Return the spectrum of one update (out, in), or of several.

    Up to a smaller dimension of ``LARGEST_EXACT`` from the eigenvalues of the smaller Gram matrix in float64: values
    below 1e-8 of the largest are lost, and float32 has none. Beyond by stochastic Lanczos quadrature (Ubaru, Chen &
    Saad, 2017), which needs products with ΔW only.

    Raises:
        ConfigError: if an update is not finite.
    """
    nodes, weights, exact, squares = [], [], True, 0.0
    for update in updates:
        norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
        if not math.isfinite(norm):
            raise ConfigError("its update is not finite: λ times γ is more than float32 holds")
        squares += norm**2
        few = min(update.shape) <= LARGEST_EXACT
        values, counts = _computed(update) if few else _estimated(update)
        nodes.append(values)
        weights.append(counts)
        exact = exact and few
    return _summary(torch.cat(nodes), torch.cat(weights), math.sqrt(squares), exact)


def spectrum_of_product(left: Tensor, right: Tensor) -> Spectrum:
    """Return the spectrum of left @ right, (out, r) and (r, in): exact at every size, by QR of the factors."""
    core = torch.linalg.qr(left.double()).R @ torch.linalg.qr(right.double().T).R.T
    values = torch.zeros(min(left.shape[0], right.shape[1]), dtype=torch.float64)
    found = torch.linalg.svdvals(core)[: len(values)]
    values[: len(found)] = found
    return _summary(values, torch.ones_like(values), float(values.norm()), exact=True)


def _summary(nodes: Tensor, weights: Tensor, norm: float, exact: bool) -> Spectrum:
    """Return the spectrum of singular values (k,), each of which counts as ``weights`` (k,) values."""
    order = nodes.argsort(descending=True)
    nodes, weights = nodes[order], weights[order]
    size = round(float(weights.sum()))
    index = _places(size)
    found = torch.searchsorted(weights.cumsum(0), torch.tensor(index, dtype=torch.float64) - 0.5)
    return Spectrum(
        norm=norm,
        effective_rank=effective_rank(nodes, weights),
        size=size,
        nonzero=round(float(weights[nodes > 1e-7 * nodes[0]].sum())),
        index=index,
        values=tuple(nodes[found.clamp(max=len(nodes) - 1)].tolist()),
        exact=exact,
    )


def _places(size: int) -> tuple[int, ...]:
    """Return the first 16 places and others, evenly spread, up to the last."""
    even = torch.linspace(1, size, _POINTS - 16).round().int().tolist()
    return tuple(sorted({*range(1, min(16, size) + 1), *even}))


def _computed(update: Tensor) -> tuple[Tensor, Tensor]:
    rows = update.double()
    rows = rows if rows.shape[0] <= rows.shape[1] else rows.T
    values = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0).sqrt()
    return values, torch.ones_like(values)


def _estimated(update: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the quadrature: Lanczos from random signs, each vector orthogonal to all before."""
    largest = float(update.abs().max()) or 1.0  # squares of numbers of float32 may exceed its range
    tall = (update if update.shape[0] >= update.shape[1] else update.T) / largest
    size = tall.shape[1]
    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (size, _PROBES), generator=draw).to(tall.dtype) * 2 - 1
    vectors = (signs / math.sqrt(size)).unsqueeze(0)  # (steps so far, m, probes)
    tridiagonal = torch.zeros(_PROBES, _STEPS, _STEPS, dtype=torch.float64)
    for step in range(_STEPS):
        new = tall.T @ (tall @ vectors[-1])
        tridiagonal[:, step, step] = (new * vectors[-1]).sum(0).double()
        for _ in range(2):
            new = new - torch.einsum("smp,sp->mp", vectors, torch.einsum("smp,mp->sp", vectors, new))
        length = new.norm(dim=0)
        ends = length <= 1e-6 * tridiagonal[:, 0, 0].to(length)  # the update has no further directions
        length = length.masked_fill(ends, 0)
        if step + 1 < _STEPS:
            tridiagonal[:, step, step + 1] = tridiagonal[:, step + 1, step] = length.double()
        vectors = torch.cat([vectors, (new / length.masked_fill(ends, torch.inf)).unsqueeze(0)])
    eigenvalues, eigenvectors = torch.linalg.eigh(tridiagonal)
    weights = eigenvectors[:, 0].square() * (size / _PROBES)
    return eigenvalues.clamp(min=0).sqrt().flatten() * largest, weights.flatten()
