"""The `randlora` command: its subcommands and what it says when something is wrong."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command; exit code 2 for a mistake of the user's, 1 for a failure, 130 for an interruption."""
    try:
        from randlora.cli.app import app
    except ModuleNotFoundError as error:
        print(f"error: the command needs the package {error.name!r}: pip install 'randlora[train]'", file=sys.stderr)
        sys.exit(2)
    app()
