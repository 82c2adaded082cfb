"""The command in this process, and what it prints."""

import json

from typer.testing import CliRunner, Result

from randlora_cli import app


def invoke(*arguments: object, code: int = 0, stdin: str | None = None) -> Result:
    """The command in a wide terminal without colours; it must end with ``code`` and without a traceback."""
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    result = runner.invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    assert "\x1b[" not in result.output
    return result


def answer(*arguments: object, code: int = 0) -> dict:
    """The JSON object that the command prints: all of stdout."""
    return json.loads(invoke(*arguments, "--json", code=code).stdout)
