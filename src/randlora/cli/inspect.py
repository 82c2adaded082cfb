"""`randlora inspect`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from randlora.cli.console import FAILURE, answering, number_text, plain_table, print_json, quoted
from randlora.text import byte_text

if TYPE_CHECKING:
    from randlora.analysis.contents import Contents

_SHOWN = 12  # layers shown without --all


def inspect(
    adapter: str = typer.Argument(help="Folder of the adapter."),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapter's config says."),
    ranks: bool = typer.Option(True, help="Compute effective ranks; minutes for billions of parameters."),
    all_layers: bool = typer.Option(False, "--all", help="Show every layer."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """What is in an adapter, and whether it is whole.

    Config, shapes, counts, norms, effective ranks; the bases are drawn again and compared with the fingerprint. The
    base model's weights are never read, only its config, for the shapes of the layers. A LoRA is shown likewise.

    Exit code 1 if the bases are wrong or a value is not finite.

    [bold]Example[/]

      randlora inspect runs/reviews/adapter
    """
    with answering(json) as out:
        from randlora.analysis.contents import inspect_adapter

        found = inspect_adapter(adapter, model, ranks)
    if json:
        print_json(asdict(found) | {"whole": found.whole})
    else:
        _show(found, out, all_layers)
    if not found.whole:
        raise typer.Exit(FAILURE)


def _show(found: Contents, out: Console, all_layers: bool) -> None:
    config, lora = found.config, found.bases == "none"
    method = "LoRA" if lora else "RandLoRA"
    out.print(
        f"[bold]{found.path}[/]: {method} for {quoted(config.get('base_model_name_or_path') or 'an unnamed model')}"
    )
    out.print(
        f"r={config['r']}, {_lora_facts(config) if lora else _facts(config)}, "
        f"task {config.get('task_type') or 'unnamed'}, saved by peft {quoted(config.get('peft_version') or 'unknown')}"
    )
    out.print(
        f"{found.parameters:,} parameters in {len(found.layers)} layers"
        + (f" and {len(found.others)} other tensors" if found.others else "")
        + f"; {byte_text(found.file_bytes)}"
        + ("" if lora else f" with {_copies(found.bases_in_file)}")
    )
    if not lora:
        _show_bases(found, out)
    shown = found.layers if all_layers else found.layers[:_SHOWN]
    rows = [
        [
            quoted(layer.name),
            f"{layer.shape[0]}×{layer.shape[1]}" if layer.shape else f"min {layer.min_dim}",
            str(layer.rank),
            str(layer.num_bases or "–"),
            f"{layer.parameters:,}",
            number_text(layer.lambda_norm),
            number_text(layer.update_norm),
            number_text(layer.effective_rank, ".1f"),
        ]
        for layer in shown
    ]
    out.print(plain_table(["layer", "weight", "r", "n", "parameters", "‖λ‖", "‖ΔW‖", "effective rank"], rows))
    if len(shown) < len(found.layers):
        out.print(f"… and {len(found.layers) - len(shown)} more layers: --all shows them")
    for name, shape in found.others.items():
        out.print(f"also trained: {quoted(name)} {'×'.join(map(str, shape))}")
    if not any(layer.lambda_norm or layer.update_norm for layer in found.layers):
        out.print(f"all {'updates' if lora else 'λ'} are 0: this adapter changes nothing yet")
    for name in found.not_finite:
        out.print(f"[bold red]not finite:[/] {quoted(name)}")


def _facts(config: dict[str, Any]) -> str:
    from randlora.ops.bases import kind_in_words

    return (
        f"alpha={config['randlora_alpha']}, scaling {config.get('randlora_scaling', 'peft')}, "
        f"{kind_in_words(config)} bases of key {config['projection_prng_key']}"
    )


def _lora_facts(config: dict[str, Any]) -> str:
    return f"alpha={config['lora_alpha']}" + (" over √r" if config.get("use_rslora") else "")


def _show_bases(found: Contents, out: Console) -> None:
    by = f" by fingerprint {quoted(found.fingerprint[:16])}…" if found.fingerprint else "; no fingerprint is recorded"
    said = {
        "verified": f"[green]verified[/]{by}",
        "from the file": "those of the file, which are not the ones that its key defines; no fingerprint confirms them",
        "unknown": "[yellow]not verified[/]",
        "wrong": "[bold red]wrong[/]",
    }[found.bases]
    out.print(f"bases: {said}")
    if found.remark:
        out.print(quoted(found.remark))
    if found.bases == "unknown":
        out.print("name the base model with --model: its config.json is enough")


def _copies(count: int) -> str:
    return {0: "no bases in it", 1: "its bases"}.get(count, f"{count} copies of its bases")
