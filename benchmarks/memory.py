"""Memory of a training step in fp32: bytes kept for the backward, and the peak of a process.

Each method runs in a process of its own. Its peak includes Python, the libraries and the frozen weights, which the
frozen model's row shows; full fine-tuning has a second copy of the weights, as if the process kept the original.
"""

import resource
from collections.abc import Iterator
from typing import Any

from .comparison import Step
from .methods import FROZEN, METHODS
from .models import LLAMA, LLAMA_QUICK, Architecture
from .processes import fresh_processes
from .saved import saved_bytes

COLUMNS = ("tokens", "method", "trainable", "saved MB", "saved beyond frozen MB", "peak MB", "peak beyond frozen MB")
STEPS = 2  # the first creates the optimiser's state


def run(quick: bool) -> Iterator[dict[str, Any]]:
    architecture, tokens = (LLAMA_QUICK, 256) if quick else (LLAMA, 2048)
    names = [name for name in METHODS if not quick or "sparse" not in name]
    floor: dict[str, Any] = {}
    with fresh_processes() as processes:
        for name in names:
            row = processes.submit(measure, name, architecture, tokens).result()
            floor = row if name == FROZEN else floor
            for what in ("saved", "peak"):
                row[f"{what} beyond frozen MB"] = row[f"{what} MB"] - floor[f"{what} MB"]
            yield {"tokens": tokens, "method": name, **row}


def measure(name: str, architecture: Architecture, tokens: int) -> dict[str, Any]:
    step = Step(METHODS[name](architecture.build().requires_grad_(False), architecture))
    step.model.enable_input_require_grads()
    batch = architecture.batch(tokens)
    for _ in range(STEPS):
        step(batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "trainable": sum(p.numel() for p in step.trainable),
        "saved MB": saved_bytes(lambda: step.model(**batch)) / 1e6,
        "peak MB": peak / 1e6,
    }
