"""Seconds to create an adapter where bases are large: on one layer of hidden size 4096, the first and a second one.

The second adapter is of the same kind and key, on the same model. Each case runs in a process of its own,
without earlier draws.
"""

from collections.abc import Iterator
from typing import Any

import peft
from torch import nn

from .files import prepare
from .processes import fresh_processes
from .rounds import seconds

COLUMNS = ("out", "in", "method", "first s", "second s")
KINDS: dict[str, dict[str, Any]] = {"": {}, ", sparse": {"sparse": True}, ", very sparse": {"very_sparse": True}}
SHAPES = ((4096, 4096), (11008, 4096))  # the attention and the MLP of a Llama of 7 billion parameters


def run(quick: bool) -> Iterator[dict[str, Any]]:
    with fresh_processes() as processes:
        for out, into in ((512, 512),) if quick else SHAPES:
            for kind in ("",) if quick else KINDS:
                for package in ("PEFT RandLora", "randlora"):
                    case = package + kind
                    times = processes.submit(create, case, KINDS[kind], out, into).result()
                    yield {"out": out, "in": into, "method": case, **times}


def create(case: str, kind: dict[str, Any], out: int, into: int) -> dict[str, float]:
    prepare(case)
    base = nn.Sequential(nn.Linear(into, out, bias=False))
    models: list[peft.PeftModel] = []
    config = peft.RandLoraConfig(r=32, target_modules=["0"], **kind)
    first = seconds(lambda: models.append(peft.get_peft_model(base, config)))
    second = seconds(lambda: models[0].add_adapter("second", peft.RandLoraConfig(r=32, target_modules=["0"], **kind)))
    return {"first s": first, "second s": second}
