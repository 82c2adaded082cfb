"""`randlora diff`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from randlora.cli.console import FAILURE, answering, number_text, plain_table, print_json, quoted

if TYPE_CHECKING:
    from randlora.analysis.difference import Difference


def diff(
    first: str = typer.Argument(help="Folder of an adapter."),
    second: str = typer.Argument(help="Folder of another."),
    model: str | None = typer.Option(None, help="Base model of both, if it is not where their configs say."),
    all_layers: bool = typer.Option(False, "--all", help="Show every layer, those that do the same too."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """How two adapters differ, in their configs and in what they do.

    The updates ΔW are compared, so that adapters of different rank, key or scaling can be told apart by what they do.
    Exit code 0 if both do the same, 1 if not, as `diff` has it.

    [bold]Example[/]

      randlora diff runs/a/adapter runs/b/adapter
    """
    with answering(json) as out:
        from randlora.analysis.difference import compare_adapters

        found = compare_adapters(first, second, model)
    if json:
        print_json(asdict(found) | {"same_effect": found.same_effect})
    else:
        _show(found, out, all_layers)
    if not found.same_effect:
        raise typer.Exit(FAILURE)


def _show(found: Difference, out: Console, all_layers: bool) -> None:
    if found.config:
        rows = [[quoted(key), quoted(a), quoted(b)] for key, (a, b) in found.config.items()]
        out.print(plain_table(["config", "first", "second"], rows, left=3))
    shown = [layer for layer in found.layers if all_layers or layer.relative != 0]
    if shown:
        rows = [
            [
                quoted(layer.name),
                "equal" if layer.same_values else "differ",
                number_text(layer.relative),
                number_text(layer.cosine, ".4f"),
            ]
            for layer in shown
        ]
        out.print(plain_table(["layer", "λ and γ", "‖ΔW₂ − ΔW₁‖ / ‖ΔW₁‖", "cosine"], rows, left=2))
    if len(shown) < len(found.layers):
        out.print(f"{len(found.layers) - len(shown)} of {len(found.layers)} layers do the same in both")
    for title, names in (("first", found.only_first), ("second", found.only_second)):
        for name in names:
            out.print(f"only in the {title}: {quoted(name)}")
    for name, largest in found.others.items():
        if largest:
            out.print(f"{quoted(name)}: largest difference {largest:.3g}")
    if found.remark:
        out.print(quoted(found.remark))
    same = "both do the same" if found.same_effect else "they differ"
    out.print(f"[bold]{'not known whether both do the same' if found.remark else same}[/]")
