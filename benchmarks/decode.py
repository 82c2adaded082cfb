"""Seconds for one token of text: one sequence, one token at a time after the cached ones, in eval mode.

The tokens are given, so that all methods read the same ones; `generate` would add only the choice of the next token.
LoRA and PEFT's RandLora are not merged.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .methods import DENSE, LORA, METHODS, PEFT_DENSE, STRUCTURED, VERY_SPARSE, fill_scalings
from .models import LLAMA, LLAMA_QUICK, Architecture, twin
from .rounds import interleave, ratio, typical

COLUMNS = ("method", "ms per token", "× base")
BASE, MERGED = "base model", "randlora, merged"
TOLERANCE = 1e-3  # of the largest logit


def run(quick: bool) -> Iterator[dict[str, Any]]:
    architecture, tokens, rounds = (LLAMA_QUICK, 4, 3) if quick else (LLAMA, 32, 7)
    models = {name: model.eval() for name, model in build(architecture).items()}
    ids = architecture.batch(tokens)["input_ids"][:1, :tokens]
    require_equal_logits({name: decode(model, ids) for name, model in models.items()})  # warms up too
    history = interleave({name: partial(decode, model, ids) for name, model in models.items()}, rounds)
    for name in models:
        yield {
            "method": name,
            "ms per token": 1e3 * typical(history, name) / tokens,
            "× base": ratio(history, name, BASE),
            "all seconds": [times[name] for times in history],
        }


def build(architecture: Architecture) -> dict[str, Any]:
    base = architecture.build().requires_grad_(False)
    names = (LORA, PEFT_DENSE, DENSE, VERY_SPARSE, STRUCTURED)
    models = {name: METHODS[name](twin(base), architecture) for name in names}
    merged = METHODS[DENSE](architecture.build().requires_grad_(False), architecture)  # changes its weights
    for model in (*models.values(), merged):
        fill_scalings(model)
    merged.merge_adapter()  # type: ignore[operator]
    return {BASE: base, **models, MERGED: merged}


@torch.no_grad()
def decode(model: Any, ids: Tensor) -> Tensor:
    """Return the logits after the last of the tokens (1, T)."""
    cache = None
    for position in range(ids.shape[1]):
        output = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    return output.logits


def require_equal_logits(logits: dict[str, Tensor]) -> None:
    expected = logits[PEFT_DENSE]
    for name in (DENSE, MERGED):
        if not (logits[name] - expected).abs().max() <= TOLERANCE * expected.abs().max():
            raise RuntimeError(f"the logits of {name!r} differ from those of PEFT's RandLora")
