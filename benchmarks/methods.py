"""The compared methods of fine-tuning, each a function that makes a frozen base model ready to train."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners import randlora as peft_randlora
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn

import randlora

from .models import Target, matched_lora_rank

FROZEN, LORA, VERA, FULL = "frozen", "LoRA", "VeRA", "full fine-tuning"
PEFT_DENSE, PEFT_VERY_SPARSE = "PEFT RandLora", "PEFT RandLora, very sparse"
DENSE, SPARSE, VERY_SPARSE = "randlora", "randlora, sparse", "randlora, very sparse"
STRUCTURED, STRUCTURED_16 = "randlora, structured, 8 groups", "randlora, structured, 16 groups"

PEERS = {
    DENSE: PEFT_DENSE,
    SPARSE: PEFT_DENSE,
    VERY_SPARSE: PEFT_VERY_SPARSE,
    STRUCTURED: PEFT_DENSE,
    STRUCTURED_16: PEFT_DENSE,
}
"""PEFT's RandLora to which each of ours is compared. Sparse bases do not change its speed; it has no other kinds."""
TWINS = {DENSE: PEFT_DENSE, VERY_SPARSE: PEFT_VERY_SPARSE}
"""Pairs of methods that must learn the same, since their bases are the same."""

Method = Callable[[Any, Target], nn.Module]


def frozen(base: Any, _target: Target) -> nn.Module:
    """Return the base unchanged, without trained values: the floor under every method."""
    return base


def lora(base: Any, target: Target) -> nn.Module:
    rank = matched_lora_rank(base, target.targets, target.rank)
    return peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules=target.targets))


def vera(base: Any, target: Target) -> nn.Module:
    return peft.get_peft_model(base, peft.VeraConfig(target_modules=target.targets))


def peft_own(**kind: Any) -> Method:
    """Return PEFT's RandLora, built from its class, since `import randlora` replaces it in PEFT's registries."""

    def build(base: Any, target: Target) -> nn.Module:
        config = peft_randlora.RandLoraConfig(r=target.rank, target_modules=target.targets, **kind)
        model = peft_randlora.RandLoraModel(base, config, "default")
        cast_adapter_dtype(model, "default")  # as get_peft_model does: λ and γ in fp32
        return model

    return build


def ours(**kind: Any) -> Method:
    def build(base: Any, target: Target) -> nn.Module:
        config = randlora.RandLoraConfig(r=target.rank, target_modules=target.targets, **kind)
        return randlora.get_peft_model(base, config)

    return build


def full(base: Any, _target: Target) -> nn.Module:
    """Return a model that trains copies of the weights, since the base's own are shared."""
    return copy.deepcopy(base).requires_grad_(True)


METHODS: dict[str, Method] = {
    FROZEN: frozen,
    LORA: lora,
    VERA: vera,
    PEFT_DENSE: peft_own(),
    PEFT_VERY_SPARSE: peft_own(very_sparse=True),
    DENSE: ours(),
    SPARSE: ours(sparse=True),
    VERY_SPARSE: ours(very_sparse=True),
    STRUCTURED: ours(structured=True),
    STRUCTURED_16: ours(structured=True, groups=16),
    FULL: full,
}


def fill_scalings(model: nn.Module) -> None:
    """Fill λ with random values, the same in PEFT's RandLora and ours, and LoRA's B, so that updates are not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_lambda" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
