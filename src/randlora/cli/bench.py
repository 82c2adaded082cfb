"""`randlora bench`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from randlora.cli.console import answering, plain_table, print_json


def bench(
    hidden: int = typer.Option(512, help="Width of the model, a multiple of 64."),
    layers: int = typer.Option(2, help="Its blocks."),
    tokens: int = typer.Option(1024, help="Tokens in a training step."),
    r: int = typer.Option(32, "--r", help="Rank of RandLoRA."),
    rounds: int = typer.Option(5, help="Steps of each method that count."),
    calibrate: bool = typer.Option(False, "--calibrate", help="Find the rates of this machine first: half a minute."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Measure what training costs on this machine.

    A small model with random weights is trained by every method in turn, some seconds each; nothing is downloaded or
    saved. With --calibrate the planner counts with rates measured here, which are printed, to be passed to
    `randlora.ops.plan.set_rates`. The full benchmarks, memory and files among them, come with the source: make bench.

    [bold]Example[/]

      randlora bench --hidden 1024 --tokens 2048
    """
    with answering(json, "nothing has been written") as out:
        from randlora.analysis.speed import measure_speed
        from randlora.ops import plan

        if calibrate:
            from randlora.calibrate import calibrate as find_rates

            find_rates()
        rates = plan.rates
        found = measure_speed(hidden, layers, tokens, r, rounds)
    if json:
        print_json({"rates": asdict(rates), "methods": [asdict(speed) for speed in found]})
        return
    rows = [[s.method, f"{s.trainable:,}", f"{s.seconds:.3f}", f"{s.ratio:.2f}"] for s in found]
    title = f"hidden {hidden}, {layers} blocks, {tokens:,} tokens, float32: medians of {rounds} steps"
    out.print(plain_table(["method", "trainable", "seconds", "× frozen"], rows, title))
    out.print(f"rates {'of this machine' if calibrate else 'by default'}: {rates}")
