"""`randlora train`."""

from __future__ import annotations

import inspect
import types
import typing
from dataclasses import asdict
from typing import Any

import typer

from randlora.cli.console import byte_text, console, explained_errors, print_json, stdout_for_json
from randlora.train.settings import TrainSettings, load_settings

_SHOWN = ("loss", "accuracy", "f1", "perplexity")


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
    if as_json and _prints():
        print_json(result)


def _prints() -> bool:
    """Of several processes, one prints."""
    from randlora.train.run import is_main_process

    return is_main_process()


def _train(settings: TrainSettings) -> dict[str, Any]:
    from randlora.train.run import train as run

    result = run(settings)
    score = ", ".join(
        f"{name.removeprefix('eval_')} {value:.4f}"
        for name, value in result.metrics.items()
        if name.startswith("eval_") and name.removeprefix("eval_") in _SHOWN
    )
    if _prints():
        console().print(f"{result.trainable_parameters:,} trained parameters, evaluation: {score}")
        console().print(f"saved in {result.result_path} ({result.result_bytes:,} bytes)")
    return asdict(result)


def _dry_run(settings: TrainSettings) -> dict[str, Any]:
    import yaml

    from randlora.train.resume import checkpoint_to_resume
    from randlora.train.run import resolve

    checkpoint = checkpoint_to_resume(settings)
    run = resolve(settings)
    total = sum(p.numel() for p in run.model.parameters())
    found: dict[str, Any] = {
        "settings": settings.model_dump(),
        "trainable_parameters": run.trainable_parameters,
        "total_parameters": total,
        "training_examples": len(run.data.train),
        "evaluation_examples": len(run.data.evaluation),
        "labels": run.data.labels,
        "resumes": None if checkpoint is None else str(checkpoint),
        **_predicted(settings, len(run.data.labels)),
    }
    out = console()
    out.print(yaml.safe_dump(found["settings"], sort_keys=False), markup=False)
    if checkpoint is not None:
        out.print(f"It would go on from {checkpoint}.")
    out.print(
        f"{run.trainable_parameters:,} of {total:,} parameters would train, on {len(run.data.train):,} examples, "
        f"evaluated on {len(run.data.evaluation):,}."
    )
    if "peak_bytes" in found:
        out.print(
            f"A step on {settings.batch_size} inputs of {settings.max_length} tokens: tensors of "
            f"{byte_text(found['peak_bytes'])} at most, {found['step_cost']:.2f} times the frozen model's arithmetic."
        )
    out.print("Nothing was trained.")
    return found


def _predicted(settings: TrainSettings, labels: int) -> dict[str, Any]:
    """Memory and cost of a step as ``randlora plan`` predicts them; nothing where it does not."""
    traced = settings.quantization == "none" and not settings.gradient_checkpointing and not settings.bf16
    if settings.method != "randlora" or settings.task not in ("causal-lm", "sequence-classification") or not traced:
        return {}
    from randlora.analysis.budget import Budget, Setup, plan_training

    setup = Setup(
        settings.model,
        task=settings.task,
        targets=settings.targets,
        kind="very_sparse" if settings.very_sparse else "sparse" if settings.sparse else "dense",
        batch_size=settings.batch_size,
        length=settings.max_length,
        num_labels=max(labels, 2),
    )
    chosen = plan_training(setup, Budget(r=settings.r)).chosen
    if chosen.peak_bytes is None or chosen.cost is None:
        return {}
    return {"peak_bytes": chosen.peak_bytes, "step_cost": chosen.cost}


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
