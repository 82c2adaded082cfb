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
"""Environment in which OpenMP's waiting threads sleep. By default they spin. On a busy machine, spinning threads take
the core from the thread that they wait for: on two cores with a load of 3.5, a step took 5.6 seconds with spinning
threads, and 2.5 with sleeping ones; with a load above 8, 15.5 and 2.5."""


def train_in_own_process(settings: TrainSettings, offline: bool = True) -> dict[str, Any]:
    """Run ``randlora train`` on ``settings`` and return its result; the progress goes to stderr.

    Args:
        settings: settings of the run.
        offline: whether to forbid access to the hub.

    Raises:
        RandLoraError: if the run fails.
        KeyboardInterrupt: on Ctrl-C, after the run has ended, with a checkpoint if the training had begun.
    """
    config = Path(settings.output_dir) / "run.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, yaml.safe_dump(settings.model_dump(), sort_keys=False))
    return run_python("randlora", "train", "--config", str(config), "--json", offline=offline)


def run_python(module: str, *arguments: str, offline: bool = True) -> dict[str, Any]:
    """Return the JSON object that ``python -m module arguments`` prints.

    Raises:
        RandLoraError: if the process fails.
        KeyboardInterrupt: on Ctrl-C, after the process has ended.
    """
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        env={**_WAITING, **os.environ, **({"HF_HUB_OFFLINE": "1"} if offline else {})},
        start_new_session=True,  # else the terminal sends Ctrl-C to it too, and two end a run at once
    ) as process:
        try:
            printed, _ = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)
            try:
                process.wait()
            finally:  # after a second Ctrl-C, too
                process.kill()
            raise
    if process.returncode != 0:
        raise RandLoraError(f"`python -m {module} {' '.join(arguments)}` ended with code {process.returncode}")
    result: dict[str, Any] = json.loads(printed)
    return result
