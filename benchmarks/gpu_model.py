"""Training steps of a model of Llama-3.2-3B's shape in bf16: each method's time, peak memory and loss."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from randlora.ops import plan, rounding
from randlora.ops.gpu import availability

from .floor import step_floor
from .gpu_clock import Rates, forget_peak, milliseconds, peak_bytes
from .methods import DENSE, FROZEN, FULL, PEFT_DENSE, SPARSE, VERY_SPARSE, Method, frozen, ours, peft_own
from .models import linear_shapes, twin

LORA = "LoRA r=32"
POSITIONS = 2048  # whose logits a loss is taken from, at most: all methods alike
TOLERANCE = 2e-2  # of a loss, beside PEFT's
TOKEN, WEIGHT = plan.Plan("token", "token", "token"), plan.Plan("weight", "weight", "weight")
QV, ALL = r".*\.(q|v)_proj", r".*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Shape:
    """A Llama, and which of its layers are adapted."""

    targets: str
    hidden: int = 3072
    intermediate: int = 8192
    layers: int = 28
    heads: int = 24
    kv_heads: int = 8
    vocab: int = 128_256
    rank: int = 32

    def build(self, device: torch.device) -> Any:
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        with device:
            model: Any = LlamaForCausalLM(config)
        return model.to(torch.bfloat16).requires_grad_(False)


@dataclass(frozen=True)
class Way:
    """A method, and the setting in which its steps run."""

    build: Method
    setting: Callable[[], AbstractContextManager[Any]] = ExitStack
    autocast: bool = False


def lora(base: Any, target: Any) -> nn.Module:
    return peft.get_peft_model(base, peft.LoraConfig(r=32, target_modules=target.targets))


def full(base: Any, target: Any) -> nn.Module:
    """Trains weights of its own in the layers that the others adapt."""
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(tuple(_names(target.targets))):
            module.weight = nn.Parameter(module.weight.detach().clone())
    return base


def switched(set_to: Callable[[bool], None], during: bool) -> Callable[[], AbstractContextManager[Any]]:
    def setting() -> ExitStack:
        stack = ExitStack()
        set_to(during)
        stack.callback(set_to, not during)
        return stack

    return setting


WAYS = {
    FROZEN: Way(frozen),
    LORA: Way(lora),
    PEFT_DENSE: Way(peft_own(), autocast=True),
    DENSE: Way(ours()),
    VERY_SPARSE: Way(ours(very_sparse=True)),
    "randlora, stochastic": Way(ours(), switched(rounding.set_stochastic_rounding, True)),
    SPARSE: Way(ours(sparse=True)),
    "randlora, no kernels": Way(ours(), switched(availability.set_kernels, False)),
    "randlora, token space": Way(ours(), lambda: plan.force(TOKEN)),
    "randlora, weight space": Way(ours(), lambda: plan.force(WEIGHT)),
    FULL: Way(full),
}


def run(
    device: torch.device, rates: Rates, shape: Shape, tokens: int, rounds: int, late: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """A row for each method; those that no time is left for are rows without figures."""
    base = shape.build(device)
    adapted, every = linear_shapes(base, shape.targets), linear_shapes(base)
    ids = torch.randint(shape.vocab, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    losses: dict[str, float] = {}
    for name, way in WAYS.items():
        row: dict[str, Any] = {"adapted": _label(shape.targets), "tokens": tokens, "method": name}
        if late():
            yield row | {"note": "not measured: out of time"}
            continue
        with way.setting():
            try:
                row |= measure(way, base, shape, ids, device, rounds)
            except torch.OutOfMemoryError:
                yield row | {"note": "out of memory"}
                continue
            finally:
                gc.collect()
                forget_peak(device)
        losses[name] = row["loss"]
        require_equal_loss(name, losses)
        share = step_floor(name, adapted, every, tokens, shape.rank, fusible=False)
        frozen_floor = rates.floor(sum(2 * tokens * out * into for out, into in every), 0)
        yield row | {"floor ms": None if share is None else share * frozen_floor}


def measure(way: Way, base: Any, shape: Shape, ids: Tensor, device: torch.device, rounds: int) -> dict[str, Any]:
    model: Any = way.build(twin(base), shape).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model.model if way.autocast else model
    inner.enable_input_require_grads()  # all walk the same path back
    if ids.shape[1] > 2 * POSITIONS:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    losses: list[Tensor] = []

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=way.autocast):
            hidden = inner.model(input_ids=ids).last_hidden_state[:, :POSITIONS]
            logits = inner.lm_head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[0, :POSITIONS])
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())

    forget_peak(device)
    time = milliseconds(step, device, rounds)
    peak = peak_bytes(device)
    return {
        "trainable": sum(parameter.numel() for parameter in trainable),
        "ms": time,
        "peak GB": None if peak is None else peak / 1e9,
        "loss": float(losses[-1]),
    }


def require_equal_loss(name: str, losses: dict[str, float]) -> None:
    """A speed counts only where the result is right."""
    dense = name.startswith(DENSE) and name not in (SPARSE, VERY_SPARSE)
    if dense and PEFT_DENSE in losses and not abs(losses[name] / losses[PEFT_DENSE] - 1) <= TOLERANCE:
        raise RuntimeError(f"the loss of {name!r} is {losses[name]}, but that of PEFT's {losses[PEFT_DENSE]}")


def _names(targets: str) -> list[str]:
    return [f"{part}_proj" for part in targets.partition("(")[2].partition(")")[0].split("|")]


def _label(targets: str) -> str:
    return ", ".join(name.removesuffix("_proj") for name in _names(targets)) if targets == QV else "all seven"
