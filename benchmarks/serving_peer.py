"""PEFT's part of `serving`. It must not import randlora, which would put its own checks around PEFT's loading."""

import gc
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def prepare() -> None:
    """Limit the process to one thread, and silence it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


class Lora:
    """A model with LoRA adapters."""

    def __init__(self, base: Path) -> None:
        if "randlora" in sys.modules:
            raise RuntimeError("this process has imported randlora, which it must not have")
        self._model: Any = None
        self._base, self.count = AutoModelForCausalLM.from_pretrained(base), 0

    def load(self, path: Path) -> None:
        name = f"a{self.count}"
        if self._model is None:
            self._model = peft.PeftModel.from_pretrained(self._base, path, adapter_name=name)
        else:
            self._model.load_adapter(path, adapter_name=name)
        self.count += 1


@cache
def model_of(base: Path) -> Lora:
    """Return the model of this process."""
    return Lora(base)


def load(base: Path, paths: list[Path]) -> dict[str, Any]:
    model = model_of(base)
    found = measure_loading(model.load, paths)
    return {"adapters": model.count, **found}


def measure_loading(load_one: Callable[[Path], None], paths: list[Path]) -> dict[str, float]:
    """Load adapters; ``one more cpu ms`` is the median of the last five, ``resident kB`` is of one of them."""
    gc.collect()
    start, memory, spent = time.perf_counter(), resident(), []
    for path in paths:
        cpu = time.process_time()
        load_one(path)
        spent.append(time.process_time() - cpu)
    return {
        "load s": time.perf_counter() - start,
        "load cpu s": sum(spent),
        "one more cpu ms": median(spent[-5:]) * 1e3,
        "resident kB": (resident() - memory) / len(paths) / 1e3,
        "process MB": resident() / 1e6,
    }


def resident() -> int:
    """Return the bytes of physical memory of the process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
