"""`randlora demo`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from randlora.cli.console import FAILURE, answering, print_json
from randlora.errors import ConfigError

if TYPE_CHECKING:
    from randlora.report.table import Row
    from randlora.train.demo import DemoResult


def demo(
    output_dir: Path = typer.Option(Path("runs/demo"), help="Folder for data, runs, table, picture and report."),
    full: bool = typer.Option(
        False, "--full", help="All 4,000 sentences of the README's table, however long it takes."
    ),
    quick: bool = typer.Option(False, "--quick", help="320 sentences, the least that shows anything."),
    seed: int = typer.Option(0, min=0, help="Seed of the split and of all training."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Fine-tune a real model on real sentences in five ways, and compare them.

    MiniLM learns to tell good film reviews from bad ones by RandLoRA, with dense bases and with structured ones, by
    LoRA with as many trainable parameters, by full fine-tuning and by training the head alone. Model and data come with
    the packages of `randlora[demo]`, so that it needs no network.

    The first steps are timed, and as many sentences taken as fit into ten minutes.

    [bold]Examples[/]

      randlora demo

      randlora demo --full
    """
    start = time.monotonic()
    with answering(json) as out:
        from randlora.train.demo import run_demo
        from randlora.train.pace import QUICK, WHOLE

        if full and quick:
            raise ConfigError("--full and --quick: take one of them, or none for what fits into ten minutes")
        size = WHOLE if full else QUICK if quick else None
        result = run_demo(output_dir, size, seed, lambda text: out.print(f"[bold]{text}[/]"))
        rows = _rows(result)
        _save(result, rows, output_dir)
        _show(result, rows, output_dir, time.monotonic() - start, out)
    if json:
        print_json(asdict(result))
    if not result.verification.holds:
        raise typer.Exit(FAILURE)


def _rows(result: DemoResult) -> list[Row]:
    from randlora.report.table import Row

    return [
        Row(
            method=name,
            trainable=run["trainable_parameters"],
            correct=round(run["metrics"]["eval_accuracy"] * result.tested),
            tested=result.tested,
            seconds_per_step=run["seconds_per_step"],
            peak_memory_bytes=run["peak_memory_bytes"],
            saved_bytes=run["result_bytes"],
        )
        for name, run in result.runs.items()
    ]


def _save(result: DemoResult, rows: list[Row], folder: Path) -> None:
    from randlora.report.figures import demo_figure
    from randlora.report.page import write_report
    from randlora.report.table import markdown_table
    from randlora.train.demo import MODULE
    from randlora.tuner.files.atomic import write_json, write_text

    write_json(asdict(result), folder, "results.json")
    write_text(folder / "table.md", markdown_table(rows))
    demo_figure(folder / "demo.png", result.losses, result.spectra, ".".join(MODULE.split(".")[2:]))
    write_report([folder / run["method"] for run in result.runs.values()], folder / "report.html")


def _show(result: DemoResult, rows: list[Row], folder: Path, seconds: float, out: Console) -> None:
    from randlora.report.table import terminal_table

    title = f"MiniLM on Rotten Tomatoes, trained on {result.trained:,} sentences, tested on {result.tested:,}"
    out.print(terminal_table(rows, title))
    out.print("accuracy: with its 95% interval; peak memory: of the whole process; saved: weights on disk")
    check = result.verification
    out.print(
        f"trained, reloaded and merged adapter on {check.examples:,} sentences: "
        f"{'the same labels' if check.same_labels else '[bold red]different labels[/]'}, largest difference of a logit "
        f"{check.reloaded_difference:.1e} reloaded, {check.merged_difference:.1e} merged"
    )
    out.print(f"adapter: {folder / 'randlora' / 'adapter'}")
    out.print(f"picture: {folder / 'demo.png'}")
    out.print(f"{seconds / 60:.1f} minutes")
    out.print(f"report: {folder / 'report.html'} (open it in a browser)")
