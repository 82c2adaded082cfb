"""The ways of fine-tuning that are compared: each turns a fresh model into one that is ready to train."""

from collections.abc import Callable

import peft
from peft.tuners import randlora as peft_randlora
from torch import nn

import randlora

from .models import TARGETS, Shape, build

PEFT_RANDLORA, RANDLORA = "PEFT RandLora", "randlora"


def frozen(shape: Shape) -> nn.Module:
    """Nothing trains: the floor under every method."""
    return build(shape).requires_grad_(False)


def lora(shape: Shape) -> nn.Module:
    config = peft.LoraConfig(r=shape.matched_lora_rank, target_modules=TARGETS)
    return peft.get_peft_model(build(shape), config)


def peft_own(shape: Shape) -> nn.Module:
    """PEFT's RandLora, built from its class, since `import randlora` has taken its place in PEFT's registries."""
    config = peft_randlora.RandLoraConfig(r=shape.rank, target_modules=TARGETS)
    return peft_randlora.RandLoraModel(build(shape), config, "default")


def ours(shape: Shape) -> nn.Module:
    return randlora.get_peft_model(build(shape), randlora.RandLoraConfig(r=shape.rank, target_modules=TARGETS))


def full(shape: Shape) -> nn.Module:
    return build(shape)


METHODS: dict[str, Callable[[Shape], nn.Module]] = {
    "frozen": frozen,
    "LoRA": lora,
    PEFT_RANDLORA: peft_own,
    RANDLORA: ours,
    "full fine-tuning": full,
}
