"""The package's own promises: version, typing, ranges, pins, and what conftest does to fresh memory."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import tomllib
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import randlora

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
EXTRAS = [
    Requirement(line)
    for name in ("train", "preferences", "demo", "quant", "serve", "dev")
    for line in PROJECT["optional-dependencies"][name]
]
PINS = {
    canonicalize_name(name): pin
    for name, pin in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}


def test_version_is_the_same_everywhere() -> None:
    assert randlora.__version__ == PROJECT["version"] == version("randlora")


def test_public_names_exist() -> None:
    assert all(hasattr(randlora, name) for name in randlora.__all__)


def test_the_imports_of_the_readme_say_nothing() -> None:
    snippet = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    lines = [line for line in snippet.splitlines() if line.startswith(("import ", "from "))]
    assert any(line.startswith("from randlora import") for line in lines)
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert run.stdout + run.stderr == ""  # libraries speak of optional packages


def test_types_are_shipped() -> None:
    assert (Path(randlora.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("requirement", [*DEPENDENCIES.values(), *EXTRAS], ids=str)
def test_every_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    assert name == "randlora" or requirement.specifier.contains(PINS[name])


def test_pins_name_no_local_build() -> None:
    assert not [pin for pin in PINS.values() if "+" in pin]


def test_the_oldest_peft_under_test_is_the_oldest_promised() -> None:
    tested = re.search(r"^MIN_PEFT := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    promised = re.search(r">=([\d.]+)", str(DEPENDENCIES["peft"].specifier))
    assert tested is not None
    assert promised is not None
    assert tested[1].startswith(promised[1])
    assert re.fullmatch(r"(\.0)*", tested[1].removeprefix(promised[1]))


def test_fresh_memory_is_nan() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()


def laid_out(text: str) -> list[str]:
    """The files of the design's layout, relative to src/randlora; a folder stands for its ``__init__.py`` too."""
    layout = text.partition("## 5. Layout")[2].partition("    src/randlora_cli/")[0]
    part, files = "", []
    for indent, name in re.findall(r"^ {4}( {2}| {4})(\S+)", layout, re.MULTILINE):
        if len(indent) == 2:
            part = name if name.endswith("/") else ""
        files.append(name if len(indent) == 2 else part + name)
    return files


def test_the_design_lays_out_every_file_and_nothing_else() -> None:
    source = ROOT / "src" / "randlora"
    named = laid_out((ROOT / "docs" / "design.md").read_text())
    folders = {name for name in named if name.endswith("/")}
    there = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    assert {name for name in named if name.endswith(".py")} | {f"{name}__init__.py" for name in folders} >= there
    assert not [name for name in named if not (source / name).exists()]
    assert len(named) == len(set(named))


def test_the_layout_is_read_with_its_folders() -> None:
    text = """## 5. Layout

    src/randlora/
      errors.py            one
      ops/                 two
        plan.py              three
        gpu/tiles.py         four, which goes
                             on.py
      text.py              five
    src/randlora_cli/      six
"""
    assert laid_out(text) == ["errors.py", "ops/", "ops/plan.py", "ops/gpu/tiles.py", "text.py"]
