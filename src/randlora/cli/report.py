"""`randlora report`."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.text import Text

from randlora.cli.console import answering, print_json
from randlora.text import byte_text


def report(
    runs: list[Path] = typer.Argument(help="Folders of runs."),
    output: Path = typer.Option(Path("report.html"), "--output", "-o", help="The file to write."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Write one HTML file about runs, side by side.

    Curves of loss and metrics, what each step cost, each layer's update beside LoRA's, λ and γ, the worst-predicted
    examples, settings and environment. The file needs no network and nothing beside it.

    A run is a folder of `randlora train`, killed ones too, or one with a PEFT adapter or the checkpoints of
    Transformers' Trainer.

    [bold]Examples[/]

      randlora report runs/randlora runs/lora

      randlora report runs/* --output comparison.html
    """
    with answering(json) as out:
        from randlora.report.page import write_report

        with out.status("reading") as status:
            write_report(runs, output, lambda text: status.update(Text(f"reading {text}")))
        size = output.stat().st_size
        out.print(f"report: {output} ({byte_text(size)})", markup=False)
    if json:
        print_json({"report": str(output), "bytes": size})
