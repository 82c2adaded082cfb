"""`randlora train`."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import Any, Literal

import typer
from pydantic.fields import FieldInfo
from rich.console import Console

from randlora.cli.console import answering, print_json
from randlora.text import byte_text
from randlora.train.settings import TrainSettings, load_settings

_SHOWN = (
    *("loss", "accuracy", "micro_f1", "macro_f1", "exact_match", "f1", "perplexity"),
    *("rmse", "r2", "pearson", "spearman", "rewards/accuracies", "rewards/margins"),
)
_NO = "no_"
_SHORT = {"learning_rate": ("--lr",)}
_PANELS = {
    "model": "Model and data",
    "method": "Method",
    "learning_rate": "Steps",
    "output_dir": "The course of the run",
    "minutes": "The comparison",
}
"""Headings in the help, by the first setting under each."""


def train(**flags: Any) -> None:
    """Fine-tune a model on your data and save the adapter.

    Settings come from a YAML file, from flags, or from both; a flag beats the file. What a file turns on, a flag with
    no- turns off: --no-bf16.

    [bold]Examples[/]

      randlora train --config run.yaml

      randlora train --model bert-base-uncased --data reviews.csv --epochs 3 --output-dir runs/reviews

      randlora train --config run.yaml --method lora --r 8 --resume auto

      randlora train --config run.yaml --learning-rate auto
    """
    config, as_json, dry_run = (flags.pop(name) for name in ("config", "json", "dry_run"))
    overrides = given(flags)
    with answering(as_json, "go on from the last checkpoint with --resume auto") as out:
        from randlora.train.run import is_main_process

        out.quiet = not is_main_process()  # only one of several processes prints
        settings = load_settings(config, overrides)
        result = _dry_run(settings, out) if dry_run else _train(settings, out)
    if as_json and not out.quiet:
        print_json(result)


def given(flags: dict[str, Any], settings: type[TrainSettings] = TrainSettings) -> dict[str, Any]:
    """Return the values of the given flags, by setting.

    ``--no-packing`` sets ``packing`` to false. A list flag that was given once becomes a single value, as in a file.
    """
    known = {name: value for name, value in flags.items() if value not in (None, [])}
    found = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in known.items()
        if name in settings.model_fields
    }
    return found | {name.removeprefix(_NO): False for name in known.keys() - found.keys() if known[name]}


def _train(settings: TrainSettings, out: Console) -> dict[str, Any]:
    from randlora.train.advice import advice
    from randlora.train.run import train as run

    for line in advice(settings):
        out.print(line, markup=False)
    if settings.learning_rate == "auto":
        from randlora.train.search import with_found_rate

        settings = with_found_rate(settings, lambda text: out.print(text, markup=False))
    result = run(settings)
    score = ", ".join(
        f"{name.removeprefix('eval_')} {value:.4f}"
        for name, value in result.metrics.items()
        if name.startswith("eval_") and name.removeprefix("eval_") in _SHOWN
    )
    out.print(f"{result.trainable_parameters:,} trained parameters, evaluation: {score}")
    out.print(f"saved in {result.result_path} ({result.result_bytes:,} bytes)", markup=False)
    return asdict(result)


def _dry_run(settings: TrainSettings, out: Console) -> dict[str, Any]:
    import yaml

    from randlora.train.data import with_task_of_labels
    from randlora.train.resume import checkpoint_to_resume
    from randlora.train.run import resolve
    from randlora.train.stream import Stream

    settings = with_task_of_labels(settings)
    checkpoint = checkpoint_to_resume(settings)
    run = resolve(settings)
    total = sum(p.numel() for p in run.model.parameters())
    examples = None if isinstance(run.data.train, Stream) else len(run.data.train)
    found: dict[str, Any] = {
        "settings": settings.resolved(),
        "trainable_parameters": run.trainable_parameters,
        "total_parameters": total,
        "training_examples": examples,
        "evaluation_examples": len(run.data.evaluation),
        "labels": run.data.labels,
        "resumes": None if checkpoint is None else str(checkpoint),
        **_predicted(settings, len(run.data.labels)),
    }
    shown = {name: value for name, value in found["settings"].items() if value not in (None, False, [])}
    out.print(yaml.safe_dump(shown, sort_keys=False), markup=False)
    if checkpoint is not None:
        out.print(f"It would go on from {checkpoint}.", markup=False)
    out.print(
        f"{run.trainable_parameters:,} of {total:,} parameters would train, on "
        f"{'a stream of' if examples is None else f'{examples:,}'} examples, evaluated on {len(run.data.evaluation):,}."
    )
    if "peak_bytes" in found:
        out.print(
            f"A step on {settings.batch_size} inputs of {settings.max_length} tokens: tensors of "
            f"{byte_text(found['peak_bytes'])} at most, {found['step_cost']:.2f} times the frozen model's arithmetic."
        )
    out.print("Nothing was trained.")
    return found


def _predicted(settings: TrainSettings, labels: int) -> dict[str, Any]:
    """Return memory and cost of a step as predicted by ``randlora plan``; empty for settings it cannot predict."""
    from randlora.train.tasks import TASKS

    traced = settings.quantization == "none" and not settings.gradient_checkpointing and not settings.bf16
    kind = TASKS[settings.task].model_type
    known: dict[str, Literal["causal-lm", "sequence-classification"]]
    known = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}
    task = known.get(kind)
    if settings.method != "randlora" or task is None or not traced:
        return {}
    from randlora.analysis.budget import Budget, Setup, plan_training
    from randlora.ops.bases import choices_of

    setup = Setup(
        settings.model,
        task=task,
        targets=settings.targets,
        kind=next(iter(choices_of(vars(settings))), "dense"),
        groups=settings.groups,
        batch_size=settings.batch_size,
        length=settings.max_length,
        num_labels=labels or 2,
    )
    chosen = plan_training(setup, Budget(r=settings.r)).chosen
    if chosen.peak_bytes is None or chosen.cost is None:
        return {}
    return {"peak_bytes": chosen.peak_bytes, "step_cost": chosen.cost}


def flags_of(settings: type[TrainSettings], left_out: Collection[str] = ()) -> Iterator[inspect.Parameter]:
    """Yield a flag for every setting, so that file and flags cannot drift apart. By default a flag is absent."""
    panel = ""
    for name, field in settings.model_fields.items():
        panel = _PANELS.get(name, panel)
        if name in left_out:
            continue
        members = _members(field.annotation)
        kind = next((t for t in members if t in (bool, int, float)), str) if str not in members else str
        kind = list[str] if list[str] in members else kind
        yield parameter(name, kind | None, None, _description(field), *_SHORT.get(name, ()), rich_help_panel=panel)
        if kind is bool:  # turns off a `true` in the file; hidden, as the help of the command explains it once
            yield parameter(_NO + name, bool, False, "", hidden=True)


def _description(field: FieldInfo) -> str:
    """Return the description with the default, unless that is "off". The bracket is escaped for rich."""
    if isinstance(field.default, str | int | float) and field.default is not False:
        return f"{field.description} \\[{field.default}]"
    return field.description or ""


def parameter(
    name: str, annotation: Any, default: object, description: str, *short: str, **more: Any
) -> inspect.Parameter:
    """Return the parameter of a flag."""
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(default, flag, *short, help=description, show_default=False, **more)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=option)


def _members(annotation: Any) -> list[Any]:
    """Return the plain types that a setting may have; a choice among strings counts as ``str``."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return [str]
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]


def _signature() -> inspect.Signature:
    own = [
        parameter("config", str | None, None, "YAML file of settings.", "-c"),
        parameter("dry_run", bool, False, "Resolve everything, train nothing."),
        parameter("json", bool, False, "Print the result as JSON on stdout."),
    ]
    return inspect.Signature([*own, *flags_of(TrainSettings)])


train.__signature__ = _signature()  # type: ignore[attr-defined]
