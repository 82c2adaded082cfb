"""A training step under torch.compile, and the seconds to compile the step with empty caches.

The input is embeddings that require a gradient, instead of tokens. So the step needs no hook, which would break the
graph. Otherwise the step is that of comparison.py, at one number of tokens.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .comparison import Step
from .methods import DENSE, FROZEN, METHODS
from .models import LLAMA, LLAMA_QUICK, Llama, twin
from .rounds import interleave, ratio, seconds, typical

COLUMNS = ("tokens", "method", "compile s", "seconds", "× frozen", "loss")
TOKENS = 256
COMPILED = {FROZEN: "frozen, compiled", DENSE: "randlora, compiled"}


def run(quick: bool) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        if quick:
            yield from compare(replace(LLAMA_QUICK, layers=1), rounds=3)
        else:
            yield from compare(LLAMA, rounds=9)


def compare(architecture: Llama, rounds: int) -> Iterator[dict[str, Any]]:
    base = architecture.build().requires_grad_(False)
    labels = architecture.batch(TOKENS)["labels"]
    batch = {"inputs_embeds": base.get_input_embeddings()(labels).requires_grad_(True), "labels": labels}
    steps = {name: Step(METHODS[name](twin(base), architecture)) for name in COMPILED}
    for name, label in COMPILED.items():
        steps[label] = Step(torch.compile(METHODS[name](twin(base), architecture)))
    actions = {name: partial(step, batch) for name, step in steps.items()}
    first = {name: seconds(action) for name, action in actions.items()}
    history = interleave(actions, rounds)
    for name, step in steps.items():
        yield {
            "tokens": TOKENS,
            "method": name,
            "compile s": first[name] if name in COMPILED.values() else None,
            "seconds": typical(history, name),
            "× frozen": ratio(history, name, FROZEN),
            "loss": step.losses[-1],
            "all seconds": [times[name] for times in history],
        }
