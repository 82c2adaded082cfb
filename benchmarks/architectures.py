"""A training step of other architectures in fp32: GPT-2's Conv1D layers, a BERT with real weights, a ViT."""

from collections.abc import Iterator
from typing import Any

from .comparison import COLUMNS as COMPARED
from .comparison import Comparison
from .models import GPT2, Architecture, MiniLM, ViT

COLUMNS = ("model", *COMPARED)
MODELS: dict[str, Architecture] = {
    "GPT-2": GPT2(hidden=768, layers=6, heads=12),
    "MiniLM": MiniLM(),
    "ViT": ViT(hidden=768, intermediate=3072, layers=4, heads=12),
}
TOKENS = {"GPT-2": (256, 1024), "MiniLM": (256, 2048), "ViT": (197, 1970)}  # a ViT's image has 197
ROUNDS = 3
QUICK: dict[str, Architecture] = {
    "GPT-2": GPT2(hidden=128, layers=2, heads=4, vocab=512),
    "MiniLM": MiniLM(),
    "ViT": ViT(hidden=128, intermediate=256, layers=2, heads=4),
}


def run(quick: bool) -> Iterator[dict[str, Any]]:
    for name, architecture in (QUICK if quick else MODELS).items():
        for tokens in TOKENS[name][:1] if quick else TOKENS[name]:
            for row in Comparison(architecture, tokens, rounds=2 if quick else ROUNDS).run():
                yield {"model": name, **row}
