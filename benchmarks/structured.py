"""A training step of the Llama shape with structured bases, beside LoRA and dense bases: CPU time of one thread.

CPU time does not depend on the load of the machine; `step` measures the same by the clock, on all cores and for more
methods.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch

from .comparison import COLUMNS as COMPARED
from .comparison import Comparison
from .methods import DENSE, FROZEN, LORA, STRUCTURED, STRUCTURED_16
from .models import LLAMA, LLAMA_QUICK

COLUMNS = tuple(column for column in COMPARED if "PEFT" not in column)
ROUNDS = {128: 5, 256: 5, 512: 3, 2048: 1}  # by tokens
METHODS = (FROZEN, LORA, DENSE, STRUCTURED, STRUCTURED_16)


def run(quick: bool) -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for tokens, rounds in {64: 1}.items() if quick else ROUNDS.items():
            shape = LLAMA_QUICK if quick else LLAMA
            yield from Comparison(shape, tokens, rounds, methods=METHODS, clock=time.process_time).run()
    finally:
        torch.set_num_threads(threads)
