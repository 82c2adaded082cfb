"""`randlora push`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from randlora.cli.console import answering, print_json
from randlora.text import byte_text


def push(
    adapter: str = typer.Argument(help="Folder of a run or of an adapter."),
    repo_id: str = typer.Argument(help="Repository on the hub, user/name; made if it is not there."),
    private: bool = typer.Option(False, "--private", help="Make a new repository private."),
    licence: str | None = typer.Option(None, "--license", help="For the model card, such as apache-2.0."),
    message: str = typer.Option("Upload RandLoRA adapter", help="Of the commit."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the files and the card, upload and write nothing."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Upload an adapter to the hub, with a model card.

    The card is filled from the run: metrics, settings, how to load the adapter. A README.md of your own stays as it is.

    [bold]Example[/]

      randlora push runs/reviews me/reviews-randlora --dry-run
    """
    with answering(json, "what the hub has received stays there; run the command again to go on") as out:
        from randlora.train.publish import publish

        done = publish(adapter, repo_id, private=private, licence=licence, message=message, upload=not dry_run)
        if dry_run:
            out.print(done.card, markup=False)
        out.print(f"{len(done.files)} files, {byte_text(done.nbytes)}: {', '.join(done.files)}")
        out.print("nothing was uploaded" if dry_run else done.url)
    if json:
        print_json(asdict(done))
