"""`python -m benchmarks.gpu`: on a GPU, measures steps of a 3B-shaped Llama, where their time goes, and each kernel.

It takes about five minutes: what matters most is measured first, and what no time is left for is said. It needs torch,
Triton, PEFT and Transformers, and this folder and `src` on the path; nothing has to be installed. Each row goes to the
standard error as soon as it is there; tables and the same figures as JSON come last, and go to a file. A wrong result
is a note in its row and the exit status 1. ``--tiny`` is a rehearsal on tiny shapes, on any device.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from randlora.ops.gpu import availability

from . import gpu_kernels, gpu_model, gpu_plans, record
from .gpu_clock import measured_rates
from .gpu_model import ALL, LORA_BF16, QV, WAYS
from .methods import PEFT_DENSE, SPARSE

SECONDS = 300  # of measuring; then the tables are printed, with a list of missing parts
STEPS = (
    "adapted",
    "tokens",
    "method",
    "trainable",
    "ms",
    "× LoRA",
    "× PEFT",
    "kernels ms",
    "host ms",
    "peak GB",
    "loss",
    "note",
)
KERNELS = ("layer", "tokens", "step", "ms", "torch ms", "floor ms", "of the floor's rate", "error")
PLANS = ("layer", "bases", "tokens", "direction", "chosen", "ms", "fastest", "fastest ms", "chosen / fastest")
PROFILE = ("ms", "calls", "share", "kernel")
TABLES = {"training steps": STEPS, "kernels": KERNELS, "plans": PLANS, "profile": PROFILE}
SHAPES = [(3072, 3072), (8192, 3072)]  # (M, m) of q and o, and of the MLP
LONG = tuple(name for name in WAYS if name not in (PEFT_DENSE, SPARSE, LORA_BF16))
CASES = [  # with rounds and methods; the case with most tokens is profiled
    (QV, 840, 21, tuple(WAYS)),
    (ALL, 4096, 7, tuple(WAYS)),
    (ALL, 16384, 3, LONG),  # these steps take most of the time
    (QV, 4096, 7, tuple(WAYS)),
]
TINY: dict[str, Any] = dict(hidden=64, intermediate=96, layers=1, heads=4, kv_heads=2, vocab=128, rank=16)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, few rounds; also without a GPU")
    parser.add_argument("--folder", type=Path, default=record.RESULTS, help="where the JSON file goes")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not given.tiny:
        parser.error("no GPU that torch sees; --tiny rehearses on the CPU")
    start = time.perf_counter()
    machine = record.this_machine() | {"device": _name(device), "kernels": _kernels(device)}
    found = measure(device, given.tiny, lambda: time.perf_counter() - start > SECONDS)
    for title, columns in TABLES.items():
        print(f"\n{title}\n{plain_table(columns, found[title])}")
    rates = found["rates"][0]
    print(f"\n{_name(device)}; kernels: {_kernels(device)}; torch {torch.__version__}")
    print(f"measured: {rates['TFLOPs']:.3g} TFLOPs in bf16 products, {rates['GB/s']:.4g} GB/s of memory")
    rows = [{"part": part} | row for part, part_rows in found.items() for row in part_rows]
    seconds = time.perf_counter() - start
    path = record.save(f"gpu-{_name(device)}" + "-tiny" * given.tiny, rows, machine, seconds, given.folder)
    print(f"{seconds:.0f} seconds; written to {path}")
    print(json.dumps(rows, ensure_ascii=False))
    if wrong := [row for row in rows if (row.get("note") or "").startswith(gpu_kernels.WRONG)]:
        sys.exit(f"{len(wrong)} wrong results, with a note in their rows")


def measure(device: torch.device, tiny: bool, late: Callable[[], bool]) -> dict[str, list[dict[str, Any]]]:
    rates = measured_rates(device, tiny)
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in ("rates", *TABLES)}
    found["rates"] += told([{"TFLOPs": 2e-12 * rates.products, "GB/s": 1e-9 * rates.memory}])
    cases = [(QV, 24, 1, tuple(WAYS)), (ALL, 24, 1, tuple(WAYS))] if tiny else CASES
    base = gpu_model.Shape(**(TINY if tiny else {})).build(device)
    for targets, tokens, rounds, methods in cases:
        shape = replace(gpu_model.Shape(**(TINY if tiny else {})), targets=targets)
        rows = gpu_model.run(device, base, shape, tokens, rounds, late, methods)
        found["training steps"] += compared(told(rows))
    shapes, tokens, rank, rounds = ([(96, 64)], 24, 16, 2) if tiny else (SHAPES, 4096, 32, 10)
    if not late():
        found["kernels"] += told(gpu_kernels.run(device, rates, shapes, tokens, rank, rounds))
    if not late():
        found["plans"] += told(gpu_plans.run(device, shapes, [8, 24] if tiny else [840, 4096, 16384], rank, rounds))
    if not late():
        targets, tokens = max(cases, key=lambda case: case[1])[:2]
        shape = replace(shape, targets=targets)
        found["profile"] += told(gpu_model.profile(device, base, shape, tokens))
    return found


def told(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as a list, after printing each as it comes: a run that is cut off leaves what it found."""
    found = []
    for row in rows:
        print(json.dumps(row, ensure_ascii=False), file=sys.stderr, flush=True)
        found.append(row)
    return found


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with their time as a multiple of LoRA's and of PEFT's RandLora."""
    times = {row["method"]: row.get("ms") for row in rows}
    return [
        row
        | {
            column: row["ms"] / times[peer] if "ms" in row and times.get(peer) else None
            for column, peer in (("× LoRA", gpu_model.LORA), ("× PEFT", gpu_model.PEFT_DENSE))
        }
        for row in rows
    ]


def plain_table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    """Return the rows with a heading, in columns of equal width; a package for tables may be missing."""
    lines = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cell(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else "cpu"


def _kernels(device: torch.device) -> str:
    return availability.why_not(device, torch.bfloat16) or "they run"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # PEFT's advice on save_projection
    logging.set_verbosity_error()
    main()
