"""The table of methods: the way of adapting the model, the budgets, and the first learning rates.

A budget is the number of values that RandLoRA of a rank trains. LoRA's rank is chosen by kind of layer, so that its
number is the same or as near as ranks can come.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import peft
from torch import nn
from transformers import GPT2LMHeadModel

import randlora
from randlora.analysis.counts import count_trainable
from randlora.ops.bases import BasisKind

from ..models import linear_shapes
from .kinds import DrawnStructured, OrthogonalDense

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
VERA_RANK = 256
"""PEFT's default. With as many values as the budgets have, VeRA would need a rank many times the model's width, and
its products would cost many times the model's own (`vera_rank`)."""

Adapt = Callable[[GPT2LMHeadModel, int, int], nn.Module]
"""A function that makes the frozen model ready to train, given r of RandLoRA at this budget, and a seed."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        adapt: function that makes the model ready to train.
        rates: first learning rates, each twice the one before.
        budgeted: whether the method runs at every budget, or once with its own number of values.
        variant: whether the method is a variant of RandLoRA rather than a rival; variants run at the first budget only.
        least_r: least r of RandLoRA at which the method has all its groups, which are at most as many as rows.
        gamma_rate: learning rate of γ as a multiple of all others.
        gamma_start: factor of γ's initial values.
    """

    adapt: Adapt
    rates: tuple[float, ...]
    budgeted: bool = True
    variant: bool = False
    least_r: int = 1
    gamma_rate: float = 1.0
    gamma_start: float = 1.0


def doubling(start: float) -> tuple[float, ...]:
    return tuple(start * 2**k for k in range(4))


def full(model: GPT2LMHeadModel, _r: int, _seed: int) -> nn.Module:
    return model.requires_grad_(True)


def lora(**options: Any) -> Adapt:
    """Return the function for LoRA with α = 2·rank in each layer."""

    def adapt(model: GPT2LMHeadModel, r: int, _seed: int) -> nn.Module:
        ranks = lora_ranks(model, r, magnitudes=options.get("use_dora", False))
        alphas = {name: 2 * rank for name, rank in ranks.items()}
        config = peft.LoraConfig(
            target_modules=list(TARGETS), rank_pattern=ranks, alpha_pattern=alphas, fan_in_fan_out=True, **options
        )
        return peft.get_peft_model(model, config)

    return adapt


def vera(model: GPT2LMHeadModel, _r: int, seed: int) -> nn.Module:
    config = peft.VeraConfig(r=VERA_RANK, target_modules=list(TARGETS), fan_in_fan_out=True, projection_prng_key=seed)
    return peft.get_peft_model(model, config)


def ours(alpha: float = 2.0, kind: BasisKind | None = None, **options: Any) -> Adapt:
    """Return the function for RandLoRA in the paper's scaling; ``kind`` is a kind of basis without an option.

    By default α = 2·r, as in the paper. Each seed has bases of its own.
    """

    def adapt(model: GPT2LMHeadModel, r: int, seed: int) -> nn.Module:
        chosen = {"randlora_scaling": "paper", **options}
        config = randlora.RandLoraConfig(
            r=r, target_modules=list(TARGETS), randlora_alpha=alpha * r, projection_prng_key=seed, **chosen
        )
        if kind is not None:
            config.basis_kind = lambda min_dim: kind  # type: ignore[method-assign]
        return randlora.get_peft_model(model, config)

    return adapt


STRUCTURED = {
    f"RandLoRA, {groups} groups": Method(ours(structured=True, groups=groups), doubling(8e-3), least_r=groups)
    for groups in (4, 8, 16, 32)
}
VARIANTS: dict[str, Method] = {
    "RandLoRA, dense, orthogonal B": Method(ours(kind=OrthogonalDense()), doubling(8e-3), variant=True),
    "RandLoRA, 8 groups, drawn Q_b": Method(ours(kind=DrawnStructured(8)), doubling(8e-3), variant=True),
    "RandLoRA, dense, α/r = 20": Method(ours(alpha=20.0, randlora_scaling="peft"), doubling(2.5e-4), variant=True),
    "RandLoRA, dense, γ rate / 4": Method(ours(), doubling(8e-3), variant=True, gamma_rate=0.25),
    "RandLoRA, dense, γ rate × 4": Method(ours(), doubling(4e-3), variant=True, gamma_rate=4.0),
    "RandLoRA, dense, γ start / 10": Method(ours(), doubling(8e-3), variant=True, gamma_start=0.1),
    "RandLoRA, dense, γ start × 16": Method(ours(), doubling(4e-3), variant=True, gamma_start=16.0),
}
"""Variants of RandLoRA."""

METHODS: dict[str, Method] = {
    "LoRA": Method(lora(), doubling(4e-3)),
    "RandLoRA, dense": Method(ours(), doubling(8e-3)),
    "full fine-tuning": Method(full, doubling(1e-3), budgeted=False),
    **STRUCTURED,
    "RandLoRA, very sparse": Method(ours(very_sparse=True), doubling(8e-3)),
    "rsLoRA": Method(lora(use_rslora=True), doubling(4e-3)),
    "DoRA": Method(lora(use_dora=True), doubling(4e-3)),
    "VeRA": Method(vera, doubling(1.6e-2), budgeted=False),
    **VARIANTS,
}
"""All methods, in the order of the study."""


def budget(model: nn.Module, r: int) -> int:
    """Return the number of values that RandLoRA of that rank trains."""
    return count_trainable(shapes(model, TARGETS), r)


def lora_ranks(model: nn.Module, r: int, magnitudes: bool) -> dict[str, int]:
    """Return the rank of each kind of layer: the same for all, and one more for some, to come nearest to the budget.

    DoRA also trains the magnitudes of a layer's outputs, which leaves fewer values to its ranks.
    """
    costs = {name: sum(map(sum, shapes(model, (name,)))) for name in TARGETS}
    own = sum(out for out, _ in shapes(model, TARGETS)) if magnitudes else 0
    rank, rest = divmod(budget(model, r) - own, sum(costs.values()))
    subsets = chain.from_iterable(combinations(costs, size) for size in range(len(costs)))
    raised = min(subsets, key=lambda names: abs(rest - sum(costs[name] for name in names)))
    return {name: max(1, rank + (name in raised)) for name in costs}


def vera_rank(model: nn.Module, r: int) -> float:
    """Return the rank at which VeRA would train as many values, with r + out in each layer."""
    outputs = [out for out, _ in shapes(model, TARGETS)]
    return (budget(model, r) - sum(outputs)) / len(outputs)


def shapes(model: nn.Module, kinds: tuple[str, ...]) -> list[tuple[int, int]]:
    return linear_shapes(model, rf".*\.({'|'.join(kinds)})")
