"""Bytes of an adapter file, and the seconds to create, save, load, merge and unmerge the adapter.

Writing and reading run in processes of their own. `import randlora` replaces PEFT's RandLora, so PEFT's can be measured
only in a process that never imported randlora; and a process that has created an adapter still has the bases that
loading must make.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import peft

from .models import LLAMA, LLAMA_QUICK, Llama, matched_lora_rank
from .processes import fresh_processes
from .rounds import seconds

CASES: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "PEFT RandLora": {},
    "PEFT RandLora, no bases": {"save_projection": False},
    "PEFT RandLora, very sparse": {"very_sparse": True},
    "randlora": {},
    "randlora, no bases": {"save_projection": False},
    "randlora, sparse": {"sparse": True},
    "randlora, very sparse": {"very_sparse": True},
}
COLUMNS = ("method", "bytes", "create s", "save s", "load s", "merge s", "unmerge s")
MERGES = 3


def run(quick: bool) -> Iterator[dict[str, Any]]:
    architecture = LLAMA_QUICK if quick else LLAMA
    with fresh_processes() as processes:
        for case in CASES:
            if quick and "sparse" in case:
                continue
            with tempfile.TemporaryDirectory() as folder:
                written = processes.submit(write, case, folder, architecture).result()
                yield {"method": case, **written, **processes.submit(read, case, folder, architecture).result()}


def write(case: str, folder: str, architecture: Llama) -> dict[str, Any]:
    prepare(case)
    base = architecture.build()
    config = config_of(case, base, architecture)
    create, model = timed(lambda: peft.get_peft_model(base, config))
    save, _ = timed(lambda: model.save_pretrained(folder))
    return {"bytes": (Path(folder) / "adapter_model.safetensors").stat().st_size, "create s": create, "save s": save}


def read(case: str, folder: str, architecture: Llama) -> dict[str, Any]:
    prepare(case)
    base = architecture.build()
    load, model = timed(lambda: peft.PeftModel.from_pretrained(base, folder))
    both = [(seconds(model.merge_adapter), seconds(model.unmerge_adapter)) for _ in range(MERGES)]
    merge, unmerge = (median(times) for times in zip(*both, strict=True))
    return {"load s": load, "merge s": merge, "unmerge s": unmerge}


def prepare(case: str) -> None:
    if case.startswith("randlora"):
        importlib.import_module("randlora")
    elif "randlora" in sys.modules:
        raise RuntimeError(f"{case!r} would measure randlora, which this process has imported")


def config_of(case: str, base: Any, architecture: Llama) -> peft.PeftConfig:
    targets = architecture.targets
    if case == "LoRA":
        return peft.LoraConfig(r=matched_lora_rank(base, targets, architecture.rank), target_modules=targets)
    return peft.RandLoraConfig(r=architecture.rank, target_modules=targets, **CASES[case])


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    result: list[Any] = []
    return seconds(lambda: result.append(action())), result[0]
