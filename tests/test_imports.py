"""The import direction, read from the syntax tree of every file under src/."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted(SOURCE.glob("randlora/**/*.py"))

# What each part may import, itself aside. "" is the package itself: `from randlora import RandLoraConfig`.
MAY_IMPORT = {
    "errors": set(),
    "ops": {"errors"},
    "tuner": {"ops", "errors"},
    "convert": {"tuner", "ops", "errors"},
    "analysis": {"tuner", "ops", "errors"},
    "": {"convert", "analysis", "tuner", "ops", "errors"},
    "train": {"", "convert", "analysis", "tuner", "ops", "errors"},
    "serve": {"", "train", "convert", "analysis", "tuner", "ops", "errors"},
    "report": {"", "convert", "analysis", "tuner", "ops", "errors"},
    "cli": {"", "serve", "train", "report", "convert", "analysis", "tuner", "ops", "errors"},
    "__main__": {"cli"},
}


def part_of(module: str) -> str:
    """randlora.ops.bases -> ops; a name that is no part, such as RandLoraConfig, is the package's own."""
    name = [*module.split("."), ""][1]
    return name if name in MAY_IMPORT else ""


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute(node: ast.ImportFrom, file: Path) -> str:
    """The module that `from x import y` names, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def imports(tree: ast.AST, file: Path) -> Iterator[str]:
    """Every name that the file takes from elsewhere, in full: `from peft.utils import x` gives peft.utils.x.

    Attributes count too: `import peft` and then `peft.utils.x` is the same thing.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{absolute(node, file)}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def starts_with(name: str, *prefixes: str) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def faults(source: str, file: Path) -> list[str]:
    """What is wrong with the imports of a file, each fault as one sentence."""
    tree = ast.parse(source)
    part = part_of(module_name(file))
    found = []
    for name in imports(tree, file):
        if starts_with(name, "randlora") and part_of(name) not in MAY_IMPORT[part] | {part}:
            found.append(f"{part or 'randlora'} imports {name}")
        if part in {"ops", "errors"} and starts_with(name, "peft", "transformers", "accelerate"):
            found.append(f"{part} imports {name}")
        if part != "tuner" and starts_with(name, "peft.tuners", "peft.utils"):
            found.append(f"{part or 'randlora'} imports {name}, which only tuner may")
        if starts_with(name, "peft") and name.rpartition(".")[2].startswith(("RandLora", "*")):
            found.append(f"takes PEFT's own {name}")
    if "peft.tuners.randlora" in source or "tuners import randlora" in source:
        found.append("mentions peft.tuners.randlora")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_one_way(file: Path) -> None:
    assert not faults(file.read_text(), file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/x.py", "from randlora.tuner import model"),
        ("ops/x.py", "from ..tuner.model import RandLoraModel"),
        ("ops/x.py", "import peft"),
        ("ops/x.py", "def f():\n    from transformers.pytorch_utils import Conv1D"),
        ("tuner/x.py", "import randlora.train.engine"),
        ("tuner/x.py", "from randlora import RandLoraConfig"),
        ("tuner/x.py", "from peft import RandLoraConfig as C"),
        ("tuner/x.py", "from peft.tuners import RandLoraModel"),
        ("tuner/x.py", "from peft import *"),
        ("tuner/x.py", "import peft\npeft.RandLoraConfig"),
        ("tuner/layers/x.py", "import importlib\nimportlib.import_module('peft.tuners.randlora')"),
        ("tuner/layers/x.py", "from ...cli import main"),
        ("train/x.py", "from peft.utils import PeftType"),
        ("train/x.py", "import peft\nprint(peft.utils.PeftType)"),
        ("train/x.py", "from randlora.report import pictures"),
        ("__init__.py", "from . import cli"),
    ],
)
def test_a_wrong_import_is_seen(file: str, source: str) -> None:
    assert faults(source, SOURCE / "randlora" / file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/x.py", "import torch\nfrom randlora.errors import ConfigError\nfrom .bases import Basis"),
        (
            "tuner/layers/x.py",
            "from peft.tuners.tuners_utils import BaseTunerLayer\nfrom ...ops import linear",
        ),
        ("tuner/layers/x.py", "from ..config import RandLoraConfig"),
        ("train/x.py", "from peft import LoraConfig, get_peft_model\nfrom randlora import RandLoraConfig"),
        ("cli/x.py", "from randlora.report import pictures\nfrom randlora.train.engine import train"),
        (
            "__init__.py",
            "from .tuner.config import RandLoraConfig\nfrom peft import PeftModel, get_peft_model",
        ),
    ],
)
def test_a_right_import_passes(file: str, source: str) -> None:
    assert not faults(source, SOURCE / "randlora" / file)


IMPORT_RANDLORA = """
import sys
def refuse(event, args):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}:
        raise RuntimeError(f"import randlora used the network: {event} {args}")
sys.addaudithook(refuse)
import accelerate, peft, transformers
before = set(sys.modules)
import randlora
print(*sorted(set(sys.modules) - before))
"""


def test_import_is_light_and_needs_no_network() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORT_RANDLORA], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    heavy = ("typer", "rich", "datasets", "matplotlib", "pydantic", "bitsandbytes")
    ours = (
        "randlora.cli",
        "randlora.train",
        "randlora.report",
        "randlora.ops.gpu.kernels",
        "randlora.ops.gpu.products",
    )
    assert not [name for name in run.stdout.split() if starts_with(name, *heavy) or name.startswith(ours)]
