"""`randlora train`."""

from __future__ import annotations

import inspect
import types
import typing
from dataclasses import asdict
from typing import Any

import typer

from randlora.cli.console import console, explained_errors, print_json, stdout_for_json
from randlora.train.settings import TrainSettings, load_settings


def train(**flags: Any) -> None:
    """Fine-tune a model on your data and save the adapter.

    Settings come from a YAML file, from flags, or from both; a flag beats the file.

    [bold]Examples[/]

      randlora train --config run.yaml

      randlora train --model bert-base-uncased --data reviews.csv --epochs 3 --output-dir runs/reviews

      randlora train --config run.yaml --method lora --r 8 --resume auto
    """
    config, as_json, dry_run = (flags.pop(name) for name in ("config", "json", "dry_run"))
    overrides = {name: value for name, value in flags.items() if value is not None}
    hint = "go on from the last checkpoint with --resume auto"
    with explained_errors(hint), stdout_for_json(as_json):
        settings = load_settings(config, overrides)
        result = _dry_run(settings) if dry_run else _train(settings)
    if as_json:
        print_json(result)


def _train(settings: TrainSettings) -> dict[str, Any]:
    from randlora.train.run import train as run

    result = run(settings)
    score = ", ".join(
        f"{name.removeprefix('eval_')} {result.metrics[name]:.4f}"
        for name in ("eval_loss", "eval_accuracy", "eval_perplexity")
        if name in result.metrics
    )
    console().print(f"{result.trainable_parameters:,} trained parameters, evaluation: {score}")
    console().print(f"saved in {result.result_path} ({result.result_bytes:,} bytes)")
    return asdict(result)


def _dry_run(settings: TrainSettings) -> dict[str, Any]:
    import yaml

    from randlora.train.run import resolve

    run = resolve(settings)
    total = sum(p.numel() for p in run.model.parameters())
    found = {
        "settings": settings.model_dump(),
        "trainable_parameters": run.trainable_parameters,
        "total_parameters": total,
        "training_examples": len(run.data.train),
        "evaluation_examples": len(run.data.evaluation),
        "labels": run.data.labels,
    }
    console().print(yaml.safe_dump(found["settings"], sort_keys=False), markup=False)
    console().print(
        f"{run.trainable_parameters:,} of {total:,} parameters would train, on {len(run.data.train):,} examples, "
        f"evaluated on {len(run.data.evaluation):,}. Nothing was trained."
    )
    return found


def _flag(name: str, annotation: Any, description: str) -> inspect.Parameter:
    """A command-line flag for one setting, absent unless given."""
    kind = next((t for t in _members(annotation) if t in (bool, int, float, str)), str)
    default = typer.Option(
        None,
        f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if kind is bool else ""),
        help=description,
        show_default=False,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind | None)


def _members(annotation: Any) -> list[Any]:
    """The plain types that a setting may have; a choice among strings is a string."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return [str]
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]


def _signature() -> inspect.Signature:
    """One flag for every setting, so that file and flags cannot drift apart."""
    own = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            annotation=str | None,
            default=typer.Option(None, "--config", "-c", help="YAML file of settings."),
        ),
        inspect.Parameter(
            "dry_run",
            inspect.Parameter.KEYWORD_ONLY,
            annotation=bool,
            default=typer.Option(False, "--dry-run", help="Resolve everything, train nothing."),
        ),
        inspect.Parameter(
            "json",
            inspect.Parameter.KEYWORD_ONLY,
            annotation=bool,
            default=typer.Option(False, "--json", help="Print the result as JSON on stdout."),
        ),
    ]
    settings = [
        _flag(name, field.annotation, field.description or "") for name, field in TrainSettings.model_fields.items()
    ]
    return inspect.Signature([*own, *settings])


train.__signature__ = _signature()  # type: ignore[attr-defined]
