"""The steps of `step`, with the model's weights in bf16 and the adapters' in fp32."""

from collections.abc import Iterator
from typing import Any

import torch

from .comparison import COLUMNS as COMPARED
from .comparison import Comparison
from .models import LLAMA, LLAMA_QUICK
from .step import ROUNDS

COLUMNS = COMPARED


def run(quick: bool) -> Iterator[dict[str, Any]]:
    comparisons = [Comparison(LLAMA, tokens, rounds, torch.bfloat16) for tokens, rounds in ROUNDS.items()]
    if quick:
        comparisons = [Comparison(LLAMA_QUICK, 64, 3, torch.bfloat16)]
    for comparison in comparisons:
        yield from comparison.run()
