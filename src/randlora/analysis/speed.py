"""A quick measurement of training on this machine: one small model, the methods in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from randlora.analysis.counts import matched_lora_rank
from randlora.errors import ConfigError
from randlora.tuner.config import RandLoraConfig

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FROZEN = "frozen"


@dataclass(frozen=True)
class Speed:
    """One method's training step.

    Attributes:
        method: its name.
        trainable: number of values that train.
        seconds: median of a step: forward, backward, AdamW.
        ratio: median of its time beside the frozen model's in the same round.
    """

    method: str
    trainable: int
    seconds: float
    ratio: float


def measure_speed(
    hidden: int = 512, layers: int = 2, tokens: int = 1024, r: int = 32, rounds: int = 5, device: str | None = None
) -> list[Speed]:
    """Return the time and memory of training steps of a Llama shape in float32, for each method.

    The methods take turns, round after round, so that a disturbance of the machine falls on all alike. LoRA has the
    rank whose count is nearest.

    Args:
        hidden: width; a multiple of 64.
        layers: number of blocks.
        tokens: in a step.
        r: rank of RandLoRA.
        rounds: steps of each method that count, after one that does not.
        device: by default the accelerator, if there is one.

    Raises:
        ConfigError: for sizes that no model can have.
    """
    if hidden < 64 or hidden % 64 or min(layers, tokens, r, rounds) < 1:
        raise ConfigError(
            f"hidden={hidden}, layers={layers}, tokens={tokens}, r={r}, rounds={rounds}: hidden must be a multiple of "
            "64, the others at least 1"
        )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    where = torch.device(device) if device else accelerator or torch.device("cpu")
    steps = {name: _Step(build(), where, tokens) for name, build in _methods(hidden, layers, r).items()}
    for step in steps.values():
        step()
    history = [{name: _seconds(step, where) for name, step in steps.items()} for _ in range(rounds)]
    return [
        Speed(
            name,
            sum(p.numel() for p in step.trainable),
            median(times[name] for times in history),
            median(times[name] / times[FROZEN] for times in history),
        )
        for name, step in steps.items()
    ]


class _Step:
    def __init__(self, model: nn.Module, device: torch.device, tokens: int) -> None:
        self.model = cast("Any", model.to(device).train())
        self.model.enable_input_require_grads()
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trainable) if self.trainable else None
        length = min(tokens, 256)
        self._ids = torch.randint(1000, (max(tokens // length, 1), length), device=device)

    def __call__(self) -> None:
        self.model(input_ids=self._ids, labels=self._ids).loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()


def _methods(hidden: int, layers: int, r: int) -> dict[str, Callable[[], nn.Module]]:
    def base() -> Any:
        torch.manual_seed(0)
        shape = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            vocab_size=1000,
        )
        return LlamaForCausalLM(shape)

    def adapted(**kind: bool) -> nn.Module:
        return get_peft_model(base(), RandLoraConfig(r=r, target_modules=list(_TARGETS), **kind))  # type: ignore[arg-type]

    wide = hidden * 11 // 4
    rank = matched_lora_rank([(hidden, hidden)] * 4 + [(hidden, wide)] * 3, r)
    return {
        FROZEN: lambda: base().requires_grad_(False),
        f"LoRA r={rank}": lambda: get_peft_model(base(), LoraConfig(r=rank, target_modules=list(_TARGETS))),
        f"RandLoRA r={r}": adapted,
        f"RandLoRA r={r}, very sparse": lambda: adapted(very_sparse=True),
        f"RandLoRA r={r}, structured": lambda: adapted(structured=True),
        "full fine-tuning": base,
    }


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
