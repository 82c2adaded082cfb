"""Runs for the report: small, large and hostile ones."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from randlora.analysis.spectrum import Spectrum
from randlora.report.runs import Run
from randlora.report.updates import LayerUpdate, Updates

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '<a href="javascript:window.hacked=1">x</a> & \u2028 ]]> <!-- ${7*7} {{ 7*7 }}',
    "😀 \u202e right to left " + "long " * 50,
]


def log(steps: int, seed: int = 0) -> list[dict]:
    draw = np.random.default_rng(seed)
    entries = [
        {
            "step": step,
            "loss": 2 * math.exp(-step / steps) + 0.1 * draw.random(),
            "grad_norm": float(draw.lognormal()),
            "learning_rate": 1e-3 * (1 - step / steps),
            "seconds": 0.3,
            "memory_bytes": 2_000_000_000 + seed,
        }
        for step in range(1, steps + 1)
    ]
    return [*entries, *({"step": at, "eval_loss": 1 / at, "eval_accuracy": 0.5} for at in (steps // 2, steps))]


def run(name: str, seed: int = 0, steps: int = 50, examples: int = 30) -> Run:
    texts = [
        {"text": f"{name} {n}", "label": "a", "predicted": "b", "confidence": 0.9, "loss": n} for n in range(examples)
    ]
    settings = {"method": "randlora", "r": 8 + seed}
    return Run(name, Path("runs") / name, settings=settings, log=log(steps, seed), examples=texts)


def updates(layers: int, bases: int = 8, low_rank: int | None = None) -> Updates:
    draw = np.random.default_rng(layers)
    index = tuple(range(1, 49))

    def one(number: int) -> LayerUpdate:
        values = tuple(sorted(draw.random(48).tolist(), reverse=True))
        if low_rank:
            values = tuple(value if place < low_rank else 0.0 for place, value in enumerate(values))
        found = Spectrum(1.0 + number, 2.0 + number, 48, low_rank or 48, index, values, True)
        scaling = (None, None) if low_rank else (tuple(draw.random(bases).tolist()), tuple(draw.random(bases).tolist()))
        return LayerUpdate(f"model.layers.{number // 4}.{'qkvo'[number % 4]}_proj", found, *scaling)

    return Updates(tuple(one(number) for number in range(layers)))


def hostile() -> tuple[list[Run], list[Updates]]:
    bad = [
        {"step": n, "loss": value, "grad_norm": math.inf} for n, value in enumerate([1.0, math.nan, None, "x", 2], 1)
    ]
    text = [
        {"text": name * 20, "label": name, "predicted": name, "confidence": math.nan, "loss": None} for name in HOSTILE
    ]
    settings = {name: name for name in HOSTILE}
    runs = [
        replace(run(name), settings={**settings, "r": n}, log=bad if n % 2 else log(20), examples=text, remarks=(name,))
        for n, name in enumerate(HOSTILE)
    ]
    found = updates(4)
    named = Updates(
        tuple(LayerUpdate(h, u.spectrum, u.lam, u.gamma) for h, u in zip(HOSTILE, found.layers, strict=True))
    )
    return runs, [named, found, Updates(remark=HOSTILE[0]), Updates()]


def write_run(folder: Path, steps: int = 6, **files: object) -> Path:
    """A folder as a run leaves it; ``files`` replace or add content."""
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log(steps)))
    (folder / "resolved.yaml").write_text("method: lora\nr: 4\n")
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder
