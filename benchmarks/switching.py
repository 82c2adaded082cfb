"""Many adapters on one model: what one more costs, and a switch to another, while 10, 100 or 1,000 are there.

Each method runs in a process of its own, as in `files`. The peers are measured with up to 100 adapters: with more of
them, adding all takes them many minutes.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
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
REPEATS, SWITCHES = 5, 100


def run(quick: bool) -> Iterator[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with fresh_processes() as processes:
        for case, counts in (QUICK if quick else CASES).items():
            rows += processes.submit(grow, case, counts).result()
    yield from sorted(rows, key=lambda row: row["adapters"])  # methods in their order: sorting is stable


def grow(case: str, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of one method for so many adapters."""
    prepare(case)
    base, rows = ARCHITECTURE.build(), []
    rank = matched_lora_rank(base, ARCHITECTURE.targets, ARCHITECTURE.rank)
    model: Any = peft.get_peft_model(base, config_of(case, rank), adapter_name="n0")
    own = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        for before, count in pairwise((1, *counts)):
            start = resident()
            for number in range(before, count):
                model.add_adapter(f"n{number}", config_of(case, rank))
            held = (resident() - start) / (count - before)
            times = measure(model, lambda: config_of(case, rank), count, folder)
            rows.append(
                {"adapters": count, "method": case, **times, "adapter kB": own / 1e3, "resident kB": held / 1e3}
            )
    return rows


def measure(model: Any, new_config: Callable[[], peft.PeftConfig], count: int, folder: str) -> dict[str, float]:
    """Medians; afterwards the model has the adapters that it had."""
    names = cycle(f"n{number}" for number in range(count))
    times: dict[str, list[float]] = {"add ms": [], "save ms": [], "delete ms": [], "load ms": [], "switch µs": []}
    for _ in range(REPEATS):
        config = new_config()
        times["add ms"].append(seconds(lambda config=config: model.add_adapter("more", config)))  # type: ignore[misc]
        times["save ms"].append(seconds(lambda: model.save_pretrained(folder, selected_adapters=["more"])))
        times["delete ms"].append(seconds(lambda: model.delete_adapter("more")))
        times["load ms"].append(seconds(lambda: model.load_adapter(Path(folder) / "more", "more")))
        model.delete_adapter("more")
        times["switch µs"].append(seconds(lambda: [model.set_adapter(next(names)) for _ in range(SWITCHES)]) / SWITCHES)
    return {name: median(found) * (1e6 if name.endswith("µs") else 1e3) for name, found in times.items()}


def config_of(case: str, lora_rank: int) -> peft.PeftConfig:
    targets = ARCHITECTURE.targets
    if case == "LoRA":
        return peft.LoraConfig(r=lora_rank, target_modules=targets)
    return peft.RandLoraConfig(r=ARCHITECTURE.rank, target_modules=targets, save_projection=False)


def resident() -> int:
    """Bytes of physical memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
