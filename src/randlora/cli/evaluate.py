"""`randlora eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import typer
from rich.console import Console

from randlora.cli.console import answering, plain_table, print_json

if TYPE_CHECKING:
    from randlora.train.infer import Score


def evaluate(
    adapter: str = typer.Argument(help="Folder of a run, an adapter or a model."),
    data: str | None = typer.Option(None, help="Data, as for training; by default the run's own evaluation data."),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapter's config says."),
    task: Literal["causal-lm", "sequence-classification"] | None = typer.Option(None, help="If it is not known."),
    base: bool = typer.Option(False, "--base", help="Score the base model too, without the adapter."),
    text_column: str = typer.Option("text", help="Column of the texts."),
    label_column: str = typer.Option("label", help="Column of the labels."),
    batch_size: int = typer.Option(32, min=1, help="Examples at a time."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Score an adapter on data.

    Accuracy with its 95% interval, loss and the share found of each label for a classifier; loss and perplexity for a
    language model.

    [bold]Examples[/]

      randlora eval runs/reviews

      randlora eval runs/reviews/adapter --data more_reviews.csv
    """
    with answering(json, "nothing has been written") as out:
        from randlora.train.infer import score
        from randlora.train.trained import load_trained

        scores = {
            name: score(
                load_trained(adapter, model, task, name == "adapter"), data, batch_size, text_column, label_column
            )
            for name in (("base", "adapter") if base else ("adapter",))
        }
    if json:
        print_json({name: asdict(found) | found.metrics for name, found in scores.items()})
    else:
        for name, found in scores.items():
            _show(name, found, out)


def _show(name: str, found: Score, out: Console) -> None:
    from randlora.report.statistics import wilson_interval

    if found.correct is None:
        out.print(
            f"{name}: loss {found.loss:.4f}, perplexity {found.metrics['perplexity']:.2f} on {found.tokens:,} tokens"
        )
        return
    low, high = wilson_interval(found.correct, found.examples)
    out.print(
        f"{name}: accuracy {found.metrics['accuracy']:.1%} ({100 * low:.1f}–{100 * high:.1f} with 95% confidence), "
        f"loss {found.loss:.4f}, on {found.examples:,} examples"
    )
    rows = [[label, f"{n:,}", f"{hits / n:.1%}" if n else "–"] for label, (n, hits) in found.by_label.items()]
    out.print(plain_table(["label", "examples", "found"], rows))
