"""The predictions of `randlora plan` for a training step, beside measurements.

They are the time as a multiple of the frozen model's step, and the peak bytes of tensors, as PyTorch's profiler sees
its allocator. The process itself takes more: another column has its peak beyond its memory before it built the model.
"""

import itertools
import resource
import tempfile
from collections.abc import Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from randlora.analysis.budget import Budget, Setup, plan_training

from .comparison import Comparison, Step
from .methods import DENSE, FROZEN, FULL, LORA, METHODS, VERY_SPARSE
from .models import LLAMA, LLAMA_QUICK, SEQUENCE, Llama
from .processes import fresh_processes

COLUMNS = ("tokens", "method", "× frozen", "planned", "off", "tensors MB", "planned MB", "MB off", "process MB")
ROUNDS = 5


def run(quick: bool) -> Iterator[dict[str, Any]]:
    architecture, counts = (LLAMA_QUICK, (256,)) if quick else (LLAMA, (256, 2048))
    for tokens in counts:
        planned = plans(architecture, tokens)
        rows = Comparison(architecture, tokens, ROUNDS, methods=(FROZEN, *planned)).run()
        measured = {row["method"]: row["× frozen"] for row in rows}
        with fresh_processes() as processes:
            for method, (cost, peak) in planned.items():
                tensors = processes.submit(tensor_bytes, method, architecture, tokens).result()
                process = processes.submit(process_bytes, method, architecture, tokens).result()
                yield {
                    "tokens": tokens,
                    "method": method,
                    "× frozen": measured[method],
                    "planned": cost,
                    "off": f"{cost / measured[method] - 1:+.0%}",
                    "tensors MB": tensors / 1e6,
                    "planned MB": peak / 1e6,
                    "MB off": f"{peak / tensors - 1:+.0%}",
                    "process MB": process / 1e6,
                }


def plans(architecture: Llama, tokens: int) -> dict[str, tuple[float, int]]:
    """Return cost and peak bytes by method."""
    config = LlamaConfig(
        hidden_size=architecture.hidden,
        intermediate_size=architecture.intermediate,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.heads,
        vocab_size=architecture.vocab,
    )
    length = min(tokens, SEQUENCE)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        dense, sparse = (
            plan_training(
                Setup(folder, kind=kind, batch_size=tokens // length, length=length), Budget(r=architecture.rank)
            )
            for kind in ("dense", "very_sparse")
        )
    options = {LORA: dense.lora, DENSE: dense.chosen, VERY_SPARSE: sparse.chosen, FULL: dense.full}
    return {name: (option.cost or 0.0, option.peak_bytes or 0) for name, option in options.items()}


def tensor_bytes(method: str, architecture: Llama, tokens: int) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        two_steps(method, architecture, tokens)
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes))


def process_bytes(method: str, architecture: Llama, tokens: int) -> int:
    before = _most_held()
    two_steps(method, architecture, tokens)
    return _most_held() - before


def two_steps(method: str, architecture: Llama, tokens: int) -> None:
    """Build the model and train two steps; the second finds the optimiser's state created."""
    base = architecture.build().requires_grad_(False)
    # full fine-tuning trains the base itself here, not a copy beside it
    step = Step(base.requires_grad_(True) if method == FULL else METHODS[method](base, architecture))
    step.model.enable_input_require_grads()
    batch = architecture.batch(tokens)
    for _ in range(2):
        step(batch)


def _most_held() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
