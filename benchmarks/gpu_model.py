"""Training steps of a model of Llama-3.2-3B's shape in bf16: each method's time, host time, peak memory and loss."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity
from transformers import LlamaConfig, LlamaForCausalLM

from randlora import RandLoraConfig
from randlora.ops import rounding

from .gpu_clock import Times, allocated_bytes, forget_peak, peak_bytes, timed, waited
from .gpu_kernels import WRONG
from .methods import DENSE, FROZEN, PEFT_DENSE, SPARSE, VERY_SPARSE, Method, frozen, ours, peft_own
from .models import twin

LORA, LORA_BF16 = "LoRA r=32", "LoRA r=32, bf16"
STOCHASTIC = "randlora, stochastic"
NEWER = [field.name for field in fields(RandLoraConfig) if field.name == "structured"]
"""A kind of bases that some versions lack."""
POSITIONS = 2048  # most positions with a loss, for all methods
TOLERANCE = 2e-2  # of a loss, beside PEFT's
QV, ALL = r".*\.(q|v)_proj", r".*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Shape:
    """A Llama and its adapted layers."""

    targets: str = QV
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
    """A method and the setting of its steps."""

    build: Method
    setting: Callable[[], AbstractContextManager[Any]] = ExitStack
    autocast: bool = False


def lora(**settings: Any) -> Method:
    def build(base: Any, target: Any) -> nn.Module:
        return peft.get_peft_model(base, peft.LoraConfig(r=32, target_modules=target.targets), **settings)

    return build


def stochastic() -> ExitStack:
    stack = ExitStack()
    rounding.set_stochastic_rounding(True)
    stack.callback(rounding.set_stochastic_rounding, False)
    return stack


WAYS = {
    FROZEN: Way(frozen),
    LORA: Way(lora()),
    DENSE: Way(ours()),
    **{f"randlora, {kind}": Way(ours(**{kind: True})) for kind in NEWER},
    STOCHASTIC: Way(ours(), stochastic),
    PEFT_DENSE: Way(peft_own(), autocast=True),
    VERY_SPARSE: Way(ours(very_sparse=True)),
    SPARSE: Way(ours(sparse=True)),
    LORA_BF16: Way(lora(autocast_adapter_dtype=False)),
}


@dataclass
class Trained:
    """A method that takes steps, with its figures so far."""

    step: Callable[[], Tensor]
    figures: dict[str, Any]


def run(
    device: torch.device,
    base: Any,
    shape: Shape,
    tokens: int,
    rounds: int,
    late: Callable[[], bool],
    methods: Sequence[str] = tuple(WAYS),
) -> list[dict[str, Any]]:
    """Return a row for each method, without figures once the time is over; the methods take their steps in turns."""
    trained: dict[str, Trained] = {}
    rows: dict[str, dict[str, Any]] = {
        name: {"adapted": _label(shape.targets), "tokens": tokens, "method": name} for name in methods
    }
    for name in methods:
        if late():
            rows[name]["note"] = "not measured: out of time"
            continue
        try:
            trained[name] = warmed(WAYS[name], base, shape, tokens, device)
        except torch.OutOfMemoryError:
            rows[name]["note"] = "out of memory"
        gc.collect()
        forget_peak(device)
    times: dict[str, list[Times]] = {name: [] for name in trained}
    for name in list(trained) * rounds:
        times[name].append(timed(trained[name].step, device))
    for name, method in trained.items():
        whole, host = zip(*times[name], strict=True)
        rows[name] |= {"ms": median(whole), "host ms": median(host), "all ms": whole} | method.figures
    losses = {name: method.figures["loss"] for name, method in trained.items()}
    for name in trained:
        rows[name]["note"] = why_wrong(name, losses)
    return list(rows.values())


def warmed(way: Way, base: Any, shape: Shape, tokens: int, device: torch.device) -> Trained:
    """Return the method after three steps, with the loss of the second, its memory and its kernels' time."""
    forget_peak(device)
    before = allocated_bytes(device)  # of the base and of the other methods
    built, trainable = training_step(way, base, shape, tokens, device)
    step = within(way, built)
    step()
    loss = float(step())
    peak = peak_bytes(device)
    figures = {
        "trainable": trainable,
        "kernels ms": device_milliseconds(step, device),
        "peak GB": None if peak is None else (peak - before + weight_bytes(base)) / 1e9,
        "loss": loss,
    }
    return Trained(step, figures)


def within(way: Way, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the step under the settings of its method."""

    def run_step() -> Tensor:
        with way.setting():
            return step()

    return run_step


def weight_bytes(model: Any) -> int:
    """Return the bytes of the model's weights, those that are tied counted once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def training_step(
    way: Way, base: Any, shape: Shape, tokens: int, device: torch.device
) -> tuple[Callable[[], Tensor], int]:
    """Return a function that takes a step and returns its loss, and the number of trained values."""
    model: Any = way.build(twin(base), shape).train()
    ids = torch.randint(shape.vocab, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model.model if way.autocast else model
    inner.enable_input_require_grads()  # so that all methods have the same backward path
    if tokens > 2 * POSITIONS:
        inner.gradient_checkpointing_enable({"use_reentrant": False})

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=way.autocast):
            hidden = inner.model(input_ids=ids).last_hidden_state[:, :POSITIONS]
            logits = inner.lm_head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[0, :POSITIONS])
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step, sum(parameter.numel() for parameter in trainable)


def device_milliseconds(step: Callable[[], Tensor], device: torch.device) -> float | None:
    """Return the sum of the times of a step's kernels; ``None`` without a GPU."""
    return sum(time for time, _ in kernels_of(step, device)) if device.type == "cuda" else None


def kernels_of(step: Callable[[], Tensor], device: torch.device) -> list[tuple[float, Any]]:
    """Return the milliseconds and the profiler's entry of each kernel of a step (on a CPU, of each operation)."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    waited(device)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        waited(device)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return sorted(
        ((1e-3 * getattr(event, key), event) for event in profiler.key_averages()), key=lambda found: -found[0]
    )


def profile(device: torch.device, base: Any, shape: Shape, tokens: int, most: int = 15) -> Iterator[dict[str, Any]]:
    """Yield the slowest kernels of our step, then the time of all others together."""
    step, _ = training_step(WAYS[DENSE], base, shape, tokens, device)
    step()
    times = kernels_of(step, device)
    total = sum(time for time, _ in times)
    rest = times[most:]
    for time_, event in times[:most]:
        yield {"ms": time_, "calls": event.count, "share": time_ / total, "kernel": event.key[:90]}
    if rest:
        left = sum(time for time, _ in rest)
        calls = sum(event.count for _, event in rest)
        yield {"ms": left, "calls": calls, "share": left / total, "kernel": f"{len(rest)} others"}


def why_wrong(name: str, losses: dict[str, float]) -> str | None:
    """Return a note if our loss differs from PEFT's with the same bases, once both are there."""
    for mine in (DENSE, STOCHASTIC):
        known = {mine, PEFT_DENSE} <= losses.keys() and name in (mine, PEFT_DENSE)
        if known and not abs(losses[mine] / losses[PEFT_DENSE] - 1) <= TOLERANCE:
            return f"{WRONG}: the loss of {mine!r} is {losses[mine]}, but that of PEFT's {losses[PEFT_DENSE]}"
    return None


def _label(targets: str) -> str:
    return "q, v" if targets == QV else "all seven"
