"""What the commands share: where they print, and how they end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console

from randlora.errors import RandLoraError

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


@contextmanager
def explained_errors(hint: str = "") -> Iterator[None]:
    """Turns the errors that randlora raises on purpose into one message and an exit code, without a traceback.

    Args:
        hint: what to say after an interruption.
    """
    try:
        yield
    except (RandLoraError, FloatingPointError) as error:
        _say("error", str(error))
        raise typer.Exit(USER_ERROR if isinstance(error, ValueError) else FAILURE) from None
    except KeyboardInterrupt:
        _say("interrupted", hint)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def stdout_for_json(wanted: bool) -> Iterator[None]:
    """Within this context everything that is printed goes to stderr, if stdout is wanted for JSON alone."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(content))


def console(to_stderr: bool = False) -> Console:
    """Where people read; without colours if it is no terminal."""
    return Console(stderr=to_stderr, highlight=False)


def _say(kind: str, text: str) -> None:
    Console(stderr=True, highlight=False).print(f"[bold red]{kind}:[/] ", end="")
    print(text, file=sys.stderr)
