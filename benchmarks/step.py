"""A training step of the Llama shape in fp32, from few tokens to many (comparison.py describes the comparison)."""

from collections.abc import Iterator
from typing import Any

from .comparison import COLUMNS as COMPARED
from .comparison import Comparison
from .models import LLAMA, LLAMA_QUICK

COLUMNS = COMPARED
ROUNDS = {128: 7, 256: 7, 512: 5, 2048: 5, 4096: 3}  # by tokens; long steps vary less


def run(quick: bool) -> Iterator[dict[str, Any]]:
    comparisons = [Comparison(LLAMA, tokens, rounds) for tokens, rounds in ROUNDS.items()]
    if quick:
        comparisons = [Comparison(LLAMA_QUICK, tokens, rounds=3) for tokens in (64, 256)]
    for comparison in comparisons:
        yield from comparison.run()
