"""Bytes of an adapter file, and the seconds it takes to create, save and load the adapter.

Each measurement runs in a process of its own. `import randlora` replaces PEFT's RandLora, so PEFT's can be measured
only where randlora was never imported; and a process that has created an adapter still holds the bases that loading
must make.
"""

import importlib
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import peft

from .models import LLAMA, LLAMA_QUICK, TARGETS, Shape, build

CASES = ("LoRA", "PEFT RandLora", "PEFT RandLora, no bases", "randlora", "randlora, no bases")
COLUMNS = ("method", "bytes", "create s", "save s", "load s")


def run(quick: bool) -> list[dict[str, Any]]:
    shape = LLAMA_QUICK if quick else LLAMA
    # A server that has imported nothing but PEFT forks the processes, which spares each of them the imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.models", "peft"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as processes:
        rows = []
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder:
                written = processes.submit(write, case, folder, shape).result()
                rows.append({"method": case, **written, **processes.submit(read, case, folder, shape).result()})
        return rows


def write(case: str, folder: str, shape: Shape) -> dict[str, Any]:
    prepare(case)
    base, config = build(shape), config_of(case, shape)
    create, model = timed(lambda: peft.get_peft_model(base, config))
    save, _ = timed(lambda: model.save_pretrained(folder))
    return {"bytes": (Path(folder) / "adapter_model.safetensors").stat().st_size, "create s": create, "save s": save}


def read(case: str, folder: str, shape: Shape) -> dict[str, Any]:
    prepare(case)
    base = build(shape)
    load, _ = timed(lambda: peft.PeftModel.from_pretrained(base, folder))
    return {"load s": load}


def prepare(case: str) -> None:
    warnings.simplefilter("ignore")  # PEFT's advice on save_projection
    if case.startswith("randlora"):
        importlib.import_module("randlora")
    elif "randlora" in sys.modules:
        raise RuntimeError(f"{case!r} would measure randlora, which this process has imported")


def config_of(case: str, shape: Shape) -> peft.PeftConfig:
    if case == "LoRA":
        return peft.LoraConfig(r=shape.matched_lora_rank, target_modules=TARGETS)
    save_projection = not case.endswith("no bases")
    return peft.RandLoraConfig(r=shape.rank, target_modules=TARGETS, save_projection=save_projection)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result
