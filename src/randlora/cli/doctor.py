"""`randlora doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from randlora.cli.console import FAILURE, answering, plain_table, print_json

_MARKS = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "broken": "[bold red]broken[/]"}


def doctor(json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout.")) -> None:
    """Versions, devices, and which products run on this machine.

    Every kind of product is tried and compared with the formula in float64. Paste the output into a bug report. Exit
    code 1 if something is broken.

    [bold]Example[/]

      randlora doctor
    """
    with answering(json) as out:
        from randlora.analysis.environment import examine

        found = examine()
    broken = [finding.name for finding in found if finding.verdict == "broken"]
    if json:
        print_json({"healthy": not broken, "findings": [asdict(finding) for finding in found]})
    else:
        rows = [[finding.topic, finding.name, _MARKS[finding.verdict], finding.detail] for finding in found]
        out.print(plain_table(["about", "what", "verdict", "found"], rows, left=4))
        out.print(f"[bold red]to be mended: {', '.join(broken)}[/]" if broken else "[bold]nothing is broken[/]")
    if broken:
        raise typer.Exit(FAILURE)
