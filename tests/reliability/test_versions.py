"""The bases are the same numbers with other versions of torch and numpy, each installed into a throw-away folder."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from ops.bases.test_bases import GOLDEN

SOURCE = Path(__file__).parents[2] / "src"

# `randlora` itself imports PEFT, which may not run with that torch: only the bases are wanted.
FINGERPRINTS = """
import sys, types
package = types.ModuleType("randlora")
package.__path__ = [sys.argv[1]]
sys.modules["randlora"] = package
import numpy, torch
from randlora.ops.bases import BasisSpec, Dense, Ternary, get_basis
print(torch.__version__.partition("+")[0], numpy.__version__)
for spec in sys.stdin.read().splitlines():
    print(get_basis(eval(spec)).fingerprint)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Removed at once: pytest keeps what its own folders hold for three runs."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def install(requirement: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--target", str(folder), requirement]
    subprocess.run(pip, check=True)


@pytest.mark.slow  # gigabytes: the wheels of most versions of torch come with CUDA
@pytest.mark.parametrize(
    "requirement", ["torch==2.6.0", "torch==2.9.1", "torch==2.13.0", "numpy==2.0.2", "numpy==2.2.6", "numpy==2.4.6"]
)
def test_the_bases_are_the_same_numbers(requirement, folder):
    name, _, wanted = requirement.partition("==")
    versions = {"torch": version("torch").partition("+")[0], "numpy": version("numpy")} | {name: wanted}
    if wanted != version(name).partition("+")[0]:
        install(requirement, folder)
    run = subprocess.run(
        [sys.executable, "-c", FINGERPRINTS, str(SOURCE / "randlora")],
        input="\n".join(map(repr, GOLDEN)),
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found, *fingerprints = run.stdout.splitlines()
    assert found == f"{versions['torch']} {versions['numpy']}"
    assert fingerprints == [fingerprint for _, fingerprint in GOLDEN.values()]
