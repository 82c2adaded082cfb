"""The Dockerfile against what it installs: no container is built here, but no line may name what does not exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word]


def all_of(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def arguments() -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in all_of("ARG"))


def copied() -> list[str]:
    return [name for rest in all_of("COPY") for name in rest.split()[:-1]]


def pip_installs() -> list[list[str]]:
    return [shlex.split(command) for rest in all_of("RUN") for command in rest.split("&&") if "pip install" in command]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line)


def test_python_is_one_that_the_project_and_its_pins_allow():
    version = Version(arguments()["PYTHON"])
    assert version in Requirement(f"python{PROJECT['project']['requires-python']}").specifier
    assert version >= Version("3.11")  # as constraints.txt says of Transformers and numpy
    (base,) = all_of("FROM")
    assert base.startswith("python:${PYTHON}-slim")


def test_all_that_is_copied_exists_and_is_sent():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    assert sorted(line[1:] for line in lines if line[0] == "!") == sorted(copied())
    assert all((ROOT / name).exists() for name in copied())


def test_the_package_can_be_built_of_it():
    build = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], *build]
    assert all(name.split("/")[0] in copied() for name in ["pyproject.toml", *needed])


def test_versions_are_the_pinned_ones():
    torch, package = pip_installs()
    for words in (torch, package):
        assert words[words.index("-c") + 1] == "constraints.txt"
    assert torch[torch.index("--index-url") + 1] == "${TORCH_INDEX}"
    assert torch[-1] == "torch"
    assert arguments()["TORCH_INDEX"].endswith("/whl/cpu")
    extras = Requirement(package[-1].replace(".", "randlora", 1)).extras
    assert extras == {"train"} <= set(PROJECT["project"]["optional-dependencies"])
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["train"]
    for requirement in map(Requirement, wanted):
        pin = pins()[requirement.name.lower().replace("-", "_")] if requirement.name == "huggingface-hub" else None
        assert (pin or pins()[requirement.name.lower()]) in requirement.specifier


def test_constraints_are_there_before_the_first_install():
    words = [word if word != "RUN" or "pip install" not in rest else "PIP" for word, rest in instructions()]
    first = words.index("PIP")
    assert ("COPY", "constraints.txt ./") in instructions()[:first]


def test_it_runs_the_command_and_not_as_root():
    (entry,) = map(json.loads, all_of("ENTRYPOINT"))
    assert len(entry) == 1
    assert entry[0] in PROJECT["project"]["scripts"]
    (user,) = all_of("USER")
    assert any(re.search(rf"useradd .*\b{user}\b", rest) for rest in all_of("RUN"))
    names = [word for word, _ in instructions()]
    assert names.index("USER") < names.index("ENTRYPOINT")


@pytest.mark.parametrize("variable", ["HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR"])
def test_caches_are_in_the_volume(variable):
    (environment,) = all_of("ENV")
    values = dict(pair.split("=", 1) for pair in shlex.split(environment))
    (volumes,) = map(json.loads, all_of("VOLUME"))
    assert values[variable].startswith(tuple(volumes))
