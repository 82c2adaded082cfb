"""README and docs run: their Python is executed, their commands and links are checked."""

import functools
import importlib.util
import pkgutil
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib
from typer.testing import CliRunner

import fresh
import randlora  # noqa: F401 - the whole package, before the command's entry imports a part of it
from randlora_cli import COMMANDS, app

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]

FENCE = re.compile(
    r"(?:<!-- snippet: skip (?P<skip>.*?) -->\s*\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n`]*\n(?P<body>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^)\s]+)\)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\"")
MAY_SKIP = ("hub:", "gpu:", "shell:")  # what a test machine lacks; a reason follows


@dataclass
class Snippet:
    language: str
    body: str
    line: int
    skip: str | None


def snippets(text: str) -> list[Snippet]:
    return [
        Snippet(
            language=match["language"],
            body=re.sub(f"^{match['indent']}", "", match["body"], flags=re.MULTILINE),
            line=text.count("\n", 0, match.start("body")) + 1,
            skip=match["skip"],
        )
        for match in FENCE.finditer(text)
    ]


# --- Python: all snippets of a page, in order, in one namespace, in an empty folder


def program(text: str) -> str:
    """The page's Python, each snippet at its own line number so that a traceback points into the page."""
    lines: list[str] = []
    for snippet in snippets(text):
        if snippet.language == "python" and not snippet.skip:
            lines += [""] * (snippet.line - 1 - len(lines)) + snippet.body.splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_the_page_runs(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    if not program(text):
        pytest.skip("no Python on this page")
    trace = fresh.run(program(text), page.name, tmp_path)
    assert not trace, trace


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_only_what_needs_hub_or_gpu_is_skipped(page: Path) -> None:
    reasons = [snippet.skip for snippet in snippets(page.read_text()) if snippet.skip]
    assert all(reason.startswith(MAY_SKIP) for reason in reasons), reasons


# --- Commands: targets, subcommands, flags, extras and modules exist


def commands(text: str) -> Iterator[list[str]]:
    """Each command of the page's shell snippets as words; in a console only the lines after a prompt."""
    for snippet in snippets(text):
        if snippet.language not in {"bash", "sh", "console"}:
            continue
        for line in snippet.body.replace("\\\n", " ").splitlines():
            if snippet.language == "console" and not line.startswith("$ "):
                continue
            for command in re.split(r"&&|\|\||[|;]", line.removeprefix("$ ").partition(" #")[0]):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)  # a variable for this command
                if words:
                    yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def complaint(words: list[str]) -> str:
    """What is wrong with a command of the documentation, or nothing."""
    match words:
        case ["make", *targets]:
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            fault = unknown("make target", [word for word in targets if "=" not in word], rules)
        case ["randlora", *arguments]:
            fault = randlora_complaint(arguments)
        case ["pip", "install", *arguments] | [_, "-m", "pip", "install", *arguments]:
            wanted = [extra for word in arguments for extra in extras_of(word)]
            fault = unknown("extra", wanted, project()["optional-dependencies"])
        case ["python" | "python3", "-m", module, *_]:
            here = importlib.util.find_spec(module) or (ROOT / module).exists()
            fault = "" if here else f"no module {module}"
        case ["python", script, *_] if script.startswith("llama.cpp/convert_"):
            fault = ""  # of the repository cloned a line before
        case ["bash" | "python" | "python3", script, *_]:
            fault = "" if (ROOT / script).exists() else f"no file {script}"
        case ["docker", "build", *_] if (ROOT / "Dockerfile").exists():
            fault = ""
        case ["docker", "run", *arguments]:
            image = next(place for place, word in enumerate(arguments) if word.partition(":")[0] == "randlora")
            fault = randlora_complaint(arguments[image + 1 :])
        case ["cd" | "git" | "source" | "pre-commit", *_]:
            fault = ""
        case _:
            fault = f"a command that this test cannot check: {words}"
    return fault


def unknown(kind: str, wanted: list[str], known: object) -> str:
    missing = [name for name in wanted if name not in known]
    return f"no {kind} {missing} among {sorted(known)}" if missing else ""


def randlora_complaint(arguments: list[str]) -> str:
    """Subcommands come first; every flag must stand in the help of the innermost one."""
    path: list[str] = []
    for word in arguments:
        if word.startswith("-") or help_of(*path, word) is None:
            break
        path.append(word)
    if arguments and not arguments[0].startswith("-") and not path:
        return f"no subcommand randlora {arguments[0]}"
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    return unknown("flag", flags, set(re.findall(r"--[\w-]+", help_of(*path) or "")))


@functools.cache
def help_of(*path: str) -> str | None:
    """The help text of a subcommand, wide enough not to be cut; None where there is no such subcommand."""
    if len(path) > 1 or not set(path) <= set(COMMANDS):  # subcommands have none of their own
        return None
    runner = CliRunner(env={"COLUMNS": "400", "TERMINAL_WIDTH": "400", "NO_COLOR": "1", "TERM": "dumb"})
    run = runner.invoke(app, [*path, "--help"])
    assert run.exit_code == 0, run.output
    return run.stdout


def extras_of(requirement: str) -> list[str]:
    found = re.fullmatch(r"(?:randlora|\.)\[([\w,-]+)\].*", requirement)
    return found[1].split(",") if found else []


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_page_exist(page: Path) -> None:
    found = [complaint(words) for words in commands(page.read_text())]
    assert not list(filter(None, found))


# --- Names in the text


def missing_names(text: str) -> list[str]:
    """Modules, classes and functions of this package that the text or its autodoc names and that do not exist."""
    missing = []
    for name in re.findall(r"(?:`|^\.\. auto\w+:: )(randlora(?:\.\w+)+)(?:`|$)", text, re.MULTILINE):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_page_exist(page: Path) -> None:
    assert not missing_names(page.read_text())


def missing_files(text: str) -> list[str]:
    """Python files that the text names from the root, from src/randlora/ or from tests/, and that do not exist."""
    named = re.findall(r"`(\w+/[\w/]*\.py)(?:::[\w:]+)?`", text)
    return [name for name in named if not any((ROOT / top / name).exists() for top in ("", "src/randlora", "tests"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_page_names_exist(page: Path) -> None:
    assert not missing_files(page.read_text())


# --- Links to files and headings


def headings(text: str) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(text: str, folder: Path) -> list[str]:
    broken = []
    for first, second in LINK.findall(re.sub(r"```.*?```|`[^`\n]+`", "", text, flags=re.DOTALL)):
        target, _, anchor = (first or second).partition("#")
        if re.match(r"\w+:", target):
            continue  # on the web
        file = folder / target if target else None
        if file and not file.exists():
            broken.append(target)
        elif anchor and anchor not in headings(file.read_text() if file else text):
            broken.append(f"{target}#{anchor}")
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_page_lead_somewhere(page: Path) -> None:
    assert not broken_links(page.read_text(), page.parent)


# --- The checks themselves see what is broken


def test_later_snippets_see_earlier_ones(tmp_path: Path) -> None:
    text = "# Title\n```python\nx = 1\n```\nand\n\n```python\nassert x == 1\n```\n"
    assert not fresh.run(program(text), "page.md", tmp_path)


def test_a_broken_snippet_fails_with_its_line(tmp_path: Path) -> None:
    text = "# Title\n```python\nx = 1\n```\nand\n\n```python\nassert x == 2\n```\n"
    assert '"page.md", line 8' in fresh.run(program(text), "page.md", tmp_path)


def test_a_skipped_snippet_does_not_run() -> None:
    text = "<!-- snippet: skip hub: downloads a model -->\n```python\nraise SystemExit(1)\n```\n"
    assert [snippet.skip for snippet in snippets(text)] == ["hub: downloads a model"]
    assert not program(text)


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "OMP_NUM_THREADS=1 make test && make no-such-target",
        "pip install 'randlora[nothing]'",
        "python -m no_such_module",
        "bash no/such/file",
        "frobnicate --all",
        "randlora no-such-subcommand",
        "randlora --no-such-flag",
    ],
)
def test_a_broken_command_is_seen(line: str) -> None:
    assert any(complaint(words) for words in commands(f"```console\n$ {line}\nits output\n```\n"))


def test_a_missing_name_is_seen() -> None:
    assert missing_names("`randlora.cli.nothing`, `randlora.train.run.train`") == ["randlora.cli.nothing"]
    assert missing_names(".. autofunction:: randlora.ops.nothing\n   :members:\n") == ["randlora.ops.nothing"]


def test_a_missing_file_is_seen() -> None:
    assert missing_files("`ops/plan.py`, `ops/gone.py`, `test_docs.py`, `tests/gone.py::test`") == [
        "ops/gone.py",
        "tests/gone.py",
    ]


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One heading\n")
    text = "[a](there.md) [b](there.md#one-heading) [c](https://example.org) ![d](gone.png) [e](there.md#other)"
    assert broken_links(text, tmp_path) == ["gone.png", "there.md#other"]
