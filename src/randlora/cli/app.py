"""The subcommands, put together."""

from __future__ import annotations

import typer

import randlora
from randlora.cli.demo import demo
from randlora.cli.train import train

app = typer.Typer(
    name="randlora",
    help="Full-rank parameter-efficient fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.command()(train)
app.command()(demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"randlora {randlora.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_version, is_eager=True),
) -> None:
    """Full-rank parameter-efficient fine-tuning."""
