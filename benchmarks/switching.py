"""Many adapters on one model: the cost of one more, and of a switch to another, with 10, 100 or 1,000 adapters.

Each method has a process of its own, as in `files`, which keeps its model; methods are measured in turn, round after
round. The peers are measured with up to 100 adapters, since adding more takes them many minutes.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import peft

from .files import prepare
from .models import Llama, matched_lora_rank
from .processes import fresh_processes
from .rounds import seconds

COLUMNS = (
    "adapters",
    "method",
    "add ms",
    "switch µs",
    "load ms",
    "save ms",
    "delete ms",
    "adapter kB",
    "resident kB",
)
ARCHITECTURE = Llama(hidden=256, intermediate=704, layers=4, heads=4, vocab=512)
CASES = {"LoRA": (10, 100), "PEFT RandLora": (10, 100), "randlora": (10, 100, 1_000)}
QUICK = {case: (2, 4) for case in CASES}
ROUNDS, SWITCHES = 7, 100


def run(quick: bool) -> Iterator[dict[str, Any]]:
    cases = QUICK if quick else CASES
    with ExitStack() as stack:
        workers = {case: stack.enter_context(fresh_processes(tasks=None)) for case in cases}
        for count in sorted({count for counts in cases.values() for count in counts}):
            there = {case: worker for case, worker in workers.items() if count in cases[case]}
            sizes = {case: worker.submit(grow, case, count).result() for case, worker in there.items()}
            history = [{case: w.submit(measure, case).result() for case, w in there.items()} for _ in range(ROUNDS)]
            for case in there:
                times = {name: median(times[case][name] for times in history) for name in history[0][case]}
                yield {"adapters": count, "method": case, **times, **sizes[case]}


@cache
def model_of(case: str) -> tuple[Any, int]:
    """Return the model of this process, made with one adapter at the first call, and the rank of its peer LoRA."""
    prepare(case)
    base = ARCHITECTURE.build()
    lora_rank = matched_lora_rank(base, ARCHITECTURE.targets, ARCHITECTURE.rank)
    return peft.get_peft_model(base, config_of(case, lora_rank), adapter_name="n0"), lora_rank


def grow(case: str, count: int) -> dict[str, float]:
    """Add adapters up to ``count``; return kB of one adapter's values and of its resident memory."""
    model, lora_rank = model_of(case)
    before, start = len(model.peft_config), resident()
    for number in range(before, count):
        model.add_adapter(f"n{number}", config_of(case, lora_rank))
    own = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {"adapter kB": own / 1e3, "resident kB": (resident() - start) / (count - before) / 1e3}


def measure(case: str) -> dict[str, float]:
    """Return the time of each operation, run once, and of many switches; the model ends with the same adapters."""
    model, lora_rank = model_of(case)
    config, names = config_of(case, lora_rank), cycle(list(model.peft_config))
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        times["add ms"] = seconds(lambda: model.add_adapter("more", config)) * 1e3
        times["save ms"] = seconds(lambda: model.save_pretrained(folder, selected_adapters=["more"])) * 1e3
        times["delete ms"] = seconds(lambda: model.delete_adapter("more")) * 1e3
        times["load ms"] = seconds(lambda: model.load_adapter(Path(folder) / "more", "more")) * 1e3
        model.delete_adapter("more")
    switches = seconds(lambda: [model.set_adapter(next(names)) for _ in range(SWITCHES)])
    return times | {"switch µs": switches / SWITCHES * 1e6}


def config_of(case: str, lora_rank: int) -> peft.PeftConfig:
    targets = ARCHITECTURE.targets
    if case == "LoRA":
        return peft.LoraConfig(r=lora_rank, target_modules=targets)
    return peft.RandLoraConfig(r=ARCHITECTURE.rank, target_modules=targets, save_projection=False)


def resident() -> int:
    """Return the bytes of physical memory of the process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
