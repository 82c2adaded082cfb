"""The parts that the commands share: consoles, tables, error messages and exit codes."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from randlora.errors import RandLoraError

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


@contextmanager
def explained_errors(hint: str = "") -> Iterator[None]:
    """Turn the errors that randlora raises on purpose into a message and an exit code, without a traceback.

    Args:
        hint: message after an interruption.
    """
    try:
        yield
    except (RandLoraError, FloatingPointError) as error:
        _say("error", str(error))
        raise typer.Exit(USER_ERROR if isinstance(error, ValueError) else FAILURE) from None
    except OSError as error:  # such as no space or no permission: not a fault of the program
        if error.filename is None:
            raise
        _say("error", f"{error.filename}: {error.strerror}")
        raise typer.Exit(FAILURE) from None
    except KeyboardInterrupt:
        _say("interrupted", hint)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def stdout_for_json(wanted: bool) -> Iterator[None]:
    """Redirect everything printed within the context to stderr, if stdout is wanted for JSON alone."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def answering(json: bool, hint: str = "") -> Iterator[Console]:
    """Yield a console for the work of a command.

    Within the context errors become messages, each warning becomes one line, and stdout stays free for JSON.

    Args:
        json: whether stdout is wanted for JSON alone.
        hint: message after an interruption.
    """
    with explained_errors(hint), stdout_for_json(json), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.filterwarnings("ignore", "Specified to not (save|load) vera_A")  # save_projection=False is wanted
        _quiet_libraries()
        yield console(to_stderr=json)


def print_json(content: Any) -> None:
    """Print one JSON object on stdout. NaN and infinity become null, because JSON has neither."""
    print(json.dumps(_without_nan(content), default=str))


def console(to_stderr: bool = False) -> Console:
    """Return a console for people; outside of a terminal without colours, and at least 140 characters wide."""
    out = Console(stderr=to_stderr, highlight=False)
    return out if out.is_terminal else Console(stderr=to_stderr, highlight=False, width=max(out.width, 140))


def plain_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, left: int = 1
) -> Table:
    """Return a table whose first ``left`` columns are aligned to the left, and the others to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAVY, title_justify="left", padding=(0, 1, 0, 0))
    table.min_width = len(title or "")  # else a title longer than the table is wrapped
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def one_or_several(given: list[str] | None) -> str | list[str] | None:
    """Return the value of a flag that was given once, and a list if the flag was given several times."""
    return given[0] if given and len(given) == 1 else given or None


def number_text(value: float | None, form: str = ".3g") -> str:
    """Return a number as text; a dash for ``None``."""
    return "–" if value is None else format(value, form)


def _quiet_libraries() -> None:
    """Silence the advice of libraries, and their progress bars outside of a terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # datasets may not be imported yet


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _show_warning(message: Warning | str, category: type[Warning], *_place: Any, **_more: Any) -> None:
    if issubclass(category, UserWarning):
        _say("note", str(message))


def _say(kind: str, text: str) -> None:
    color = {"note": "yellow"}.get(kind, "red")
    Console(stderr=True, highlight=False).print(f"[bold {color}]{kind}:[/] ", end="")
    print("\n".join(map(_printable, text.split("\n"))), file=sys.stderr)


def quoted(text: object) -> str:
    """Return text from an untrusted file, safe for a terminal: without markup and control characters."""
    return escape(_printable(str(text)))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
