"""Files of results with their provenance."""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("randlora", "torch", "peft", "transformers", "accelerate", "safetensors", "numpy")


def save(
    name: str, rows: list[dict[str, Any]], machine: dict[str, Any], seconds: float, folder: Path | None = None
) -> Path:
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "duration in seconds": round(seconds),
        "machine": machine,
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a folder on the path
        return "not installed"


def this_machine() -> dict[str, Any]:
    """Return the properties of the machine on which figures depend, with its load before a benchmark runs."""
    cpu = Path("/proc/cpuinfo")
    models = [line.partition(": ")[2] for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "platform": platform.platform(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def commit() -> str:
    """Return the commit, with a mark if the tree differs from it; empty outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    run = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return run.stdout.strip()
