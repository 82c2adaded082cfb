"""`randlora plan`."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import typer
from rich.console import Console

from randlora.cli.console import answering, number_text, plain_table, print_json
from randlora.errors import ConfigError
from randlora.text import byte_text

if TYPE_CHECKING:
    from randlora.analysis.budget import Option, TrainingPlan

_USUAL_R = 32  # the default of `randlora train`
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def plan(
    model: str = typer.Argument(help="Folder of the model or its name on the hub; only its config is read."),
    params: str | None = typer.Option(None, help="Budget: at most so many trainable parameters, such as 10M or 500k."),
    percent: float | None = typer.Option(None, help="Budget: at most this percentage of the model's parameters."),
    match_lora: int | None = typer.Option(None, help="Budget: as many as LoRA of this rank on the same layers."),
    r: int | None = typer.Option(None, "--r", help="No budget, but this r."),
    target_modules: str = typer.Option("all-linear", help="all-linear, or names separated by commas."),
    task: Literal["causal-lm", "sequence-classification"] = typer.Option("causal-lm", help="What is trained."),
    bases: Literal["dense", "sparse", "very-sparse", "structured"] = typer.Option("dense", help="Kind of the bases."),
    groups: int = typer.Option(8, help="Groups of structured bases, a power of two."),
    batch_size: int = typer.Option(8, help="Sequences in a training step."),
    length: int = typer.Option(256, help="Tokens in a sequence."),
    dtype: Literal["float32", "bfloat16", "float16"] = typer.Option("float32", help="Of the model's weights."),
    num_labels: int = typer.Option(2, min=1, help="Labels of a classifier."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Before training: parameters, bytes, memory and cost, for every r.

    Nothing is downloaded but the model's config, and nothing is trained. Counts are exact. Peak memory is that of
    PyTorch's tensors, without Python and its libraries. Cost is that of a training step as a multiple of the frozen
    model's forward and backward.

    A larger r gives FEWER trainable parameters: n·(r + m) for each layer, with n = ceil(m / r) bases, m being the
    smaller dimension of its weight. The update has full rank for every r, but with sparse bases. Without a budget the
    table is around r = 32.

    [bold]Examples[/]

      randlora plan bert-base-uncased --task sequence-classification

      randlora plan meta-llama/Llama-3.2-1B --params 10M

      randlora plan bert-base-uncased --task sequence-classification --match-lora 16
    """
    with answering(json) as out:
        import torch

        from randlora.analysis.budget import Budget, Setup, plan_training

        setup = Setup(
            model=model,
            task=task,
            targets=target_modules if target_modules == "all-linear" else target_modules.split(","),
            kind="very_sparse" if bases == "very-sparse" else bases,
            groups=groups,
            batch_size=batch_size,
            length=length,
            dtype=getattr(torch, dtype),
            num_labels=num_labels,
        )
        given = any(value is not None for value in (params, percent, match_lora, r))
        budget = Budget(_count(params), percent, match_lora, r) if given else Budget(r=_USUAL_R)
        found = plan_training(setup, budget)
    if json:
        print_json(asdict(found))
    else:
        _show(found, out)


def _count(text: str | None) -> int | None:
    """Return the number written as 10M, 500k or 1.5e6."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:[._]\d+)*(?:e\d+)?)([KMB]?)", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"params={text!r} must be a number, such as 10M, 500k or 2000000")
    return round(float(found[1].replace("_", "")) * _UNITS[found[2].upper()])


def _show(found: TrainingPlan, out: Console) -> None:
    setup = found.setup
    out.print(
        f"[bold]{setup.model}[/]: {found.parameters:,} parameters; {found.layers} layers are adapted: "
        f"{', '.join(found.targets)}"
    )
    rows = [_row(o, o == found.chosen) for o in found.options] + [_row(found.lora), _row(found.full)]
    columns = ["method", "r", "n", "trainable", "%", "bases", "file", "with bases", "peak memory", "× frozen step"]
    title = f"steps of {setup.batch_size} × {setup.length} tokens, {str(setup.dtype).removeprefix('torch.')}"
    out.print(plain_table(columns, rows, title))
    out.print(
        "r: a larger r means fewer parameters; n: bases of the widest layer; the update has full rank for every r"
        + (", but for columns of zeros (docs/sparse.md)" if "sparse" in setup.kind else "")
    )
    out.print("bases: in memory; file: what is saved; peak memory: tensors of a training step with AdamW")
    if found.remark:
        out.print(found.remark, markup=False)
    r, trainable = found.chosen.r, found.chosen.trainable
    flags = f"--r {r} --scaling paper"
    if found.structured_cost and found.chosen.cost and found.structured_cost < found.chosen.cost:
        flags += " --structured"
        out.print(
            f"structured bases: {found.structured_cost:.2f} × the frozen step instead of {found.chosen.cost:.2f}, "
            "and a little less accurate (docs/structured.md)"
        )
    out.print(f"[bold]r = {r}[/] trains {trainable:,} parameters: randlora train --model {setup.model} {flags} …")


def _row(option: Option, chosen: bool = False) -> list[str]:
    return [
        f"[bold]{option.method} ←[/]" if chosen else option.method,
        "" if option.r is None else str(option.r),
        str(option.bases or ""),
        f"{option.trainable:,}",
        f"{option.percent:.3g}",
        byte_text(option.bases_bytes) if option.bases_bytes else "",
        byte_text(option.file_bytes),
        byte_text(option.file_bytes_with_bases) if option.bases else "",
        "–" if option.peak_bytes is None else byte_text(option.peak_bytes),
        number_text(option.cost, ".2f"),
    ]
