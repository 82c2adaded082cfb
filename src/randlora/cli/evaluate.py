"""`randlora eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from randlora.cli.console import answering, one_or_several, plain_table, print_json
from randlora.train.settings import TaskName

if TYPE_CHECKING:
    from randlora.train.infer import Score

_MOST_COLUMNS = 12  # labels in the printed matrix; --json has all


def evaluate(
    adapter: str = typer.Argument(help="Folder of a run, an adapter or a model."),
    data: list[str] | None = typer.Option(
        None, help="Data, as for training; by default the run's own evaluation data."
    ),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapter's config says."),
    task: TaskName | None = typer.Option(None, help="If it is not known."),
    base: bool = typer.Option(False, "--base", help="Score the base model too, without the adapter."),
    input_column: list[str] | None = typer.Option(None, help="Column of the input, as for training."),
    label_column: list[str] | None = typer.Option(None, help="Column of the labels, as for training."),
    encoding: str | None = typer.Option(None, help="Of files of text, such as cp1252; by default UTF-8."),
    batch_size: int = typer.Option(32, min=1, help="Examples at a time."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Score an adapter on data.

    Accuracy with its 95% interval, loss, F1 and the share found of each label for a classifier, and what was found
    instead; F1 and exact matches for several labels; errors and correlations for a regression; F1 of entities for
    tags; loss and perplexity for a language model; of preferences, in how many pairs the chosen answer has the higher
    reward, and by how much.

    [bold]Examples[/]

      randlora eval runs/reviews

      randlora eval runs/reviews/adapter --data more_reviews.csv
    """
    with answering(json, "nothing has been written") as out:
        from randlora.train.infer import score
        from randlora.train.trained import load_trained

        scores = {
            name: score(
                load_trained(adapter, model, task, name == "adapter"),
                data or None,
                batch_size,
                one_or_several(input_column),
                one_or_several(label_column),
                encoding,
            )
            for name in (("base", "adapter") if base else ("adapter",))
        }
    if json:
        print_json({name: _flat(found) for name, found in scores.items()})
    else:
        for name, found in scores.items():
            _show(name, found, out)


def _flat(found: Score) -> dict[str, Any]:
    outcome = asdict(found.outcome)
    intervals = {"intervals": found.intervals} if found.intervals else {}
    return {"task": found.task, "examples": found.examples, **outcome.pop("metrics"), **outcome, **intervals}


def _show(name: str, found: Score, out: Console) -> None:
    from randlora.report.statistics import wilson_interval

    outcome = found.outcome
    metrics = dict(outcome.metrics)
    trials = outcome.tokens or found.examples
    said = []
    if outcome.correct is not None:
        low, high = wilson_interval(outcome.correct, trials)
        share = next(one for one in ("accuracy", "rewards/accuracies") if one in metrics)
        said.append(f"{share} {metrics.pop(share):.1%} ({100 * low:.1f}–{100 * high:.1f} with 95% confidence)")
    said += [f"{metric} {value:.4f}{_interval(found, metric)}" for metric, value in metrics.items()]
    if name == "base" and (outcome.by_label or outcome.baseline):
        name = "base, with an untrained head"
    out.print(f"{name}: {', '.join(said)}, on {trials:,} {'tokens' if outcome.tokens else 'examples'}")
    if found.intervals:
        out.print("(in brackets: 95% intervals, by drawing the examples again)")
    if outcome.baseline is not None:
        constant = ", ".join(f"{metric} {value:.4f}" for metric, value in outcome.baseline.metrics.items())
        out.print(f"{outcome.baseline.answer}: {constant}", markup=False)
    if outcome.by_label:
        rows = [[label, f"{n:,}", f"{hits / n:.1%}" if n else "–"] for label, (n, hits) in outcome.by_label.items()]
        out.print(plain_table(["label", "tokens" if outcome.tokens else "examples", "found"], rows))
    if outcome.confusion and len(outcome.confusion) <= _MOST_COLUMNS:
        labels = list(outcome.by_label)
        rows = [[label, *map(str, counts)] for label, counts in zip(labels, outcome.confusion, strict=True)]
        out.print(plain_table(["has ↓ was given →", *labels], rows))
    if outcome.shortfall:
        out.print(outcome.shortfall, markup=False)


def _interval(found: Score, metric: str) -> str:
    low, high = found.intervals.get(metric, (None, None))
    return "" if low is None else f" ({low:.4f}–{high:.4f})"
