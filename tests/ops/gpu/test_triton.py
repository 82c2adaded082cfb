"""Runs ``triton_cases.py`` where Triton is to interpret: that must be said before anything imports Triton."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is for Linux only")
@pytest.mark.parametrize("group", ["TestAgainstTheTwins", "not TestAgainstTheTwins"])
def test_the_kernels(group):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(CASES),
        "-k",
        group,
        "-q",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:]
    assert " passed" in run.stdout
