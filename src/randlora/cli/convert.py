"""`randlora convert`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

import typer
from rich.console import Console

from randlora.cli.console import answering, plain_table, print_json
from randlora.errors import ConfigError
from randlora.text import byte_text


def convert(
    adapter: str = typer.Argument(help="Folder of a RandLoRA adapter, of this package or of PEFT."),
    output: str | None = typer.Argument(None, help="New folder."),
    to: Literal["compact", "lora"] = typer.Option(help="compact: without bases; lora: an adapter of LoRA."),
    rank: int | None = typer.Option(None, help="lora: rank of every layer."),
    energy: float | None = typer.Option(None, help="lora: instead, the share of each update to keep, such as 0.95."),
    in_place: bool = typer.Option(False, "--in-place", help="compact: replace the old file once the new is verified."),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapter's config says."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Turn an adapter into a LoRA, or a large file into a small one.

    compact leaves out the bases, which PEFT writes once for every layer. They are drawn again and compared with every
    copy, and the new file is read back, before the old one may go.

    lora takes the nearest LoRA to each layer's update, and says how far off it is. Of the base model only the config
    is read.

    [bold]Examples[/]

      randlora convert old/adapter small/adapter --to compact

      randlora convert old/adapter --to compact --in-place

      randlora convert runs/reviews/adapter lora/adapter --to lora --rank 16
    """
    with answering(json, "nothing has been changed") as out:
        if (output is None) != in_place:
            raise ConfigError(f"output={output!r}, in_place={in_place}: name a new folder, or say --in-place")
        if to == "compact":
            result = _compact(adapter, output, model, out)
        else:
            if output is None:
                raise ConfigError("--in-place is for --to compact: name a new folder for the LoRA")
            result = _lora(adapter, output, rank, energy, model, out)
    if json:
        print_json(result)


def _compact(adapter: str, output: str | None, model: str | None, out: Console) -> dict[str, object]:
    from randlora.convert.compact import compact_adapter

    done = compact_adapter(adapter, output, model)
    out.print(f"{done.path}: {byte_text(done.bytes_before)} before, {byte_text(done.bytes_after)} now")
    out.print(f"{done.compared} tensors compared, bit by bit; bases of fingerprint {done.fingerprint[:16]}…")
    if done.bases_kept:
        out.print("the bases are not those that the key defines, so they stay in the file, once")
    if output is not None:
        out.print(f"the old file is untouched: {adapter}")
    return asdict(done)


def _lora(
    adapter: str, output: str, rank: int | None, energy: float | None, model: str | None, out: Console
) -> dict[str, object]:
    from randlora.convert.lora import convert_folder_to_lora

    done = convert_folder_to_lora(adapter, output, rank=rank, energy=energy, base_model_path=model)
    worst = sorted(done.layers, key=lambda layer: -layer.relative_error)[:8]
    rows = [[layer.name, str(layer.rank), f"{layer.relative_error:.1%}"] for layer in worst]
    out.print(plain_table(["layer", "rank", "lost of ‖ΔW‖"], rows, f"the worst of {len(done.layers)} layers"))
    if done.config.rank_pattern:
        out.print("its layers differ in rank, as PEFT reads it; llama.cpp would scale them wrongly: it needs --rank")
    parameters = sum(tensor.numel() for tensor in done.tensors.values())
    out.print(f"{output}: a LoRA of {parameters:,} parameters, which PEFT loads without randlora")
    layers = [asdict(layer) for layer in done.layers]
    return {"path": output, "parameters": parameters, "layers": layers}
