"""A run in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from randlora.errors import RandLoraError
from randlora.train.settings import TrainSettings
from randlora.tuner.files.atomic import write_text

_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP's threads sleep while they wait. By default they spin, and take the core from the thread that they wait for if
something else runs too: on two cores with a load of 3.5 a step took 5.6 seconds, with sleeping threads 2.5; with a load
above 8, 15.5 and 2.5."""


def train_in_own_process(settings: TrainSettings, offline: bool = True) -> dict[str, Any]:
    """``randlora train`` on ``settings``; its progress goes to stderr.

    Args:
        settings: of the run.
        offline: whether all it needs is here.

    Raises:
        RandLoraError: if it fails.
        KeyboardInterrupt: on Ctrl-C, when it has ended, with a checkpoint if it had begun to train.
    """
    config = Path(settings.output_dir) / "run.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, yaml.safe_dump(settings.model_dump(), sort_keys=False))
    return run_python("randlora", "train", "--config", str(config), "--json", offline=offline)


def run_python(module: str, *arguments: str, offline: bool = True) -> dict[str, Any]:
    """Return the JSON object that ``python -m module arguments`` prints.

    Raises:
        RandLoraError: if it fails.
        KeyboardInterrupt: on Ctrl-C, when it has ended.
    """
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        env={**_WAITING, **os.environ, **({"HF_HUB_OFFLINE": "1"} if offline else {})},
        start_new_session=True,  # else the terminal would send it a Ctrl-C of its own, and two end a run at once
    ) as process:
        try:
            printed, _ = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)
            try:
                process.wait()
            finally:  # a second Ctrl-C
                process.kill()
            raise
    if process.returncode != 0:
        raise RandLoraError(f"`python -m {module} {' '.join(arguments)}` ended with code {process.returncode}")
    result: dict[str, Any] = json.loads(printed)
    return result
