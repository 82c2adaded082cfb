"""The share of full fine-tuning's update on the hard task that each method can express, apart from its training.

Full fine-tuning moves each adapted weight by some W*. LoRA's nearest update has W*'s largest singular values.
RandLoRA's is found by turns: with γ fixed the update is linear in λ, and with λ fixed each of its columns is so in γ.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora import RandLoraLayer
from randlora.tuner.layers.base import adapted as adapted_layers

from .hard_task import data
from .hard_task.methods import METHODS, TARGETS, lora_ranks
from .hard_task.model import FOLDER, pretrained, reading, train
from .hard_task.runs import adapted, rated
from .hard_task.settings import QUICK, STUDY, Task

COLUMNS = ("budget", "method", "share")
"""share: share of the squared norm of W*, over all adapted layers."""
RATE = 2e-3  # full fine-tuning's best
SWEEPS = 20  # turns of λ and γ
RANDLORA = ("RandLoRA, dense", "RandLoRA, 4 groups", "RandLoRA, 8 groups", "RandLoRA, very sparse")


def run(quick: bool) -> Iterator[dict[str, Any]]:
    if not quick:
        yield from shares(STUDY, RATE, FOLDER)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield from shares(QUICK, RATE, Path(folder))


def shares(task: Task, rate: float, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the share of W* that each method reaches at each budget."""
    updates = full_updates(task, rate, folder)
    total = sum(float(update.square().sum()) for update in updates.values())
    for r in task.ranks:
        reached = {"LoRA": sum(lora_reach(update, rank) for update, rank in with_ranks(updates, task, r, folder))}
        for name in RANDLORA:
            if METHODS[name].least_r <= r:
                model = adapted(METHODS[name], task, r, 0, folder)
                reached[name] = sum(
                    randlora_reach(layer, updates[name_of_base(path)]) for path, layer in adapted_layers(model).items()
                )
        yield from ({"budget": f"r = {r}", "method": name, "share": value / total} for name, value in reached.items())


def full_updates(task: Task, rate: float, folder: Path) -> dict[str, Tensor]:
    """Return W* (M, m) of each adapted weight, in float64, as full fine-tuning of the first seed leaves it."""
    torch.set_num_threads(1)
    method = METHODS["full fine-tuning"]
    before, model = weights(pretrained(task.base, folder)), adapted(method, task, 0, 0, folder)
    train(model, rated(method, model, rate), reading(data.source().train, task.base, task.steps, task.batch, seed=0))
    return {name: tall(weight - before[name]) for name, weight in weights(model).items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight.detach().double().clone()
        for name, module in model.named_modules()
        if name.endswith(TARGETS)
    }


def tall(matrix: Tensor) -> Tensor:
    return matrix if len(matrix) >= matrix.shape[1] else matrix.T


def name_of_base(path: str) -> str:
    return path.removeprefix("base_model.model.")


def with_ranks(updates: dict[str, Tensor], task: Task, r: int, folder: Path) -> list[tuple[Tensor, int]]:
    """Return each update with the rank that LoRA has there."""
    ranks = lora_ranks(pretrained(task.base, folder), r, magnitudes=False)
    return [
        (update, next(rank for kind, rank in ranks.items() if name.endswith(kind))) for name, update in updates.items()
    ]


def lora_reach(update: Tensor, rank: int) -> float:
    """Return the squared norm of the nearest matrix of that rank."""
    return float(torch.linalg.svdvals(update)[:rank].square().sum())


def randlora_reach(layer: RandLoraLayer, update: Tensor) -> float:
    """Return the squared norm of W* minus that of its distance to the nearest update found by turns of λ and γ."""
    A, B = layer.basis("default").tensors(torch.device("cpu"), torch.float64, layer.sizes("default"))
    lam, gamma = (parameter.detach().double() for parameter in layer._scalings("default"))
    lam = torch.randn(lam.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(SWEEPS):
        gamma = nearest_gamma(A, B, lam, update)
        lam = nearest_lambda(A, B, gamma, update)
    return float(update.square().sum() - (update - product(A, B, lam, gamma)).square().sum())


def product(A: Tensor, B: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    """Return ΔW (M, m) of A (r, m), B (M, r·n), λ (r, n) and γ (n, m), without the scaling."""
    return B @ torch.einsum("km,kn,nm->knm", A, lam, gamma).flatten(0, 1)


def nearest_gamma(A: Tensor, B: Tensor, lam: Tensor, update: Tensor) -> Tensor:
    """Return the best γ (n, m) for this λ: column j of the update is Σ_b γ_bj Σ_k λ_kb A_kj B_kb."""
    parts = torch.einsum("Mkn,kn,km->mMn", B.unflatten(1, lam.shape), lam, A)
    return torch.linalg.lstsq(parts, update.T.unsqueeze(2), driver="gelsd").solution.squeeze(2).T


def nearest_lambda(A: Tensor, B: Tensor, gamma: Tensor, update: Tensor) -> Tensor:
    """Return the best λ (r, n) for this γ, by the normal equations of its r·n terms of rank one."""
    rows = torch.einsum("km,nm->knm", A, gamma).flatten(0, 1)  # each beside its column of B
    gram = (B.T @ B) * (rows @ rows.T)
    right = ((B.T @ update) * rows).sum(1, keepdim=True)
    return torch.linalg.lstsq(gram, right, driver="gelsd").solution.reshape(len(A), -1)
