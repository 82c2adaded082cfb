"""`randlora merge`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from randlora.cli.console import answering, print_json
from randlora.text import byte_text


def merge(
    adapter: str = typer.Argument(help="Folder of the adapter."),
    output: str = typer.Argument(help="New folder for the whole model."),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapter's config says."),
    dtype: str = typer.Option("auto", help="Of the merged weights: auto (as the base model has them), float32, …"),
    max_shard_size: str = typer.Option("5GB", help="Most bytes in one file, such as 5GB."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Write the model with its adapter merged into its weights.

    The result loads with `from_pretrained`, without PEFT and without randlora. The sum is rounded once, into the dtype
    of the base model. The tokenizer, or the image processor, goes with it. The folder appears when everything is in it.

    [bold]Example[/]

      randlora merge runs/reviews/adapter merged
    """
    with answering(json, f"nothing has been written to {output}") as out:
        from randlora.convert.merged_folder import merge_folder

        done = merge_folder(adapter, output, base_model_path=model, dtype=dtype, max_shard_size=max_shard_size)
        out.print(f"{output}: {byte_text(done.nbytes)} in {done.files} files, {done.dtype}")
        prepares = {"tokenizer": done.tokenizer, "image processor": done.image_processor}
        found = " and ".join(name for name, there in prepares.items() if there)
        out.print(f"with its {found}" if found else "no tokenizer was found beside the adapter or its model")
    if json:
        print_json(asdict(done))
