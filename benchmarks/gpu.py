"""`python -m benchmarks.gpu`: on a GPU, checks every kernel, measures it, and measures steps of a 3B-shaped Llama.

It ends within eight minutes: what matters most is measured first, and what no time is left for is said. The tables come
last. Results go to benchmarks/results/gpu-DEVICE.json. ``--small`` is a rehearsal on tiny shapes, on any device.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from randlora.ops.gpu import availability

from . import gpu_kernels, gpu_model, record
from .gpu_clock import measured_rates
from .table import table

SECONDS = 440  # of measuring; then what is left out is said, and the tables are printed
KERNELS = ("layer", "tokens", "kernel", "ms", "torch ms", "floor ms", "of the floor's rate", "error")
STEPS = ("adapted", "tokens", "method", "trainable", "ms", "× LoRA", "× PEFT", "floor ms", "peak GB", "loss", "note")
SHAPES = [(3072, 3072), (3072, 1024), (8192, 3072)]  # (M, m) of q and o, k and v, and the MLP
CASES = [(gpu_model.QV, 4096), (gpu_model.ALL, 4096), (gpu_model.QV, 840), (gpu_model.QV, 16384)]
CASES += [(gpu_model.ALL, 840), (gpu_model.ALL, 16384)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes, few rounds; also without a GPU")
    small = parser.parse_args(arguments).small
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not small:
        parser.error("no GPU that torch sees; --small rehearses on the CPU")
    start = time.perf_counter()
    machine = record.this_machine() | {"device": _name(device), "kernels": _kernels(device)}
    result = measure(device, small, lambda: time.perf_counter() - start > SECONDS)
    rows = [{"part": part} | row for part, found in result.items() for row in found]
    path = record.save(f"gpu-{_name(device)}" + "-small" * small, rows, machine, time.perf_counter() - start)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(f"{_name(device)}; kernels: {_kernels(device)}; written to {path}")
    console.print(table("kernels", KERNELS, result["kernels"]))
    console.print(table("training steps", STEPS, [dict.fromkeys(STEPS) | row for row in result["steps"]]))
    rates = result["rates"][0]
    console.print(f"measured: {rates['TFLOPs']:.3g} TFLOPs in bf16 products, {rates['GB/s']:.4g} GB/s of memory")


def measure(device: torch.device, small: bool, late: Any) -> dict[str, list[dict[str, Any]]]:
    rates = measured_rates(device, small)
    rounds = 2 if small else 10
    result: dict[str, list[dict[str, Any]]] = {
        "rates": [{"TFLOPs": 2e-12 * rates.products, "GB/s": 1e-9 * rates.memory}],
        "kernels": [],
        "steps": [],
    }
    shapes, cases = ([(96, 64)], [(gpu_model.QV, 24), (gpu_model.ALL, 24)]) if small else (SHAPES, CASES)
    for tokens in (24,) if small else (4096, 840):
        result["kernels"] += gpu_kernels.run(device, rates, shapes, tokens, 16 if small else 32, rounds)
    for targets, tokens in cases:
        shape = gpu_model.Shape(targets)
        if small:
            shape = replace(shape, hidden=64, intermediate=96, layers=1, heads=4, kv_heads=2, vocab=128, rank=16)
        rows = list(gpu_model.run(device, rates, shape, tokens, min(rounds, 5), late))
        result["steps"] += compared(rows)
    return result


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their time as a multiple of LoRA's and of PEFT's RandLora."""
    times = {row["method"]: row.get("ms") for row in rows}
    return [
        row
        | {
            column: row["ms"] / times[peer] if "ms" in row and times.get(peer) else None
            for column, peer in (("× LoRA", gpu_model.LORA), ("× PEFT", gpu_model.PEFT_DENSE))
        }
        for row in rows
    ]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else "cpu"


def _kernels(device: torch.device) -> str:
    return availability.why_not(device, torch.bfloat16) or "they run"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # PEFT's advice on save_projection
    logging.set_verbosity_error()
    main()
