"""The entry of the `randlora` command, which starts fast.

This module is outside the package `randlora`, because importing the package imports PEFT, which takes seconds. The
module only names the subcommands. A subcommand's own module defines its flags and imports little. The package itself is
imported when the work begins.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import logging
import sys
from importlib.metadata import version
from typing import Any

try:
    import typer
    from typer.core import TyperCommand, TyperGroup
except ModuleNotFoundError as _error:
    print(f"error: the command needs the package {_error.name!r}: pip install 'randlora[train]'", file=sys.stderr)
    sys.exit(2)

COMMANDS = {
    "plan": ("plan:plan", "Before training: parameters, bytes, memory and cost, for every r."),
    "train": ("train:train", "Fine-tune a model on your data and save the adapter."),
    "compare": ("compare:compare", "Try the methods on your data in a given time: does full rank help?"),
    "eval": ("evaluate:evaluate", "Score an adapter on data."),
    "predict": ("predict:predict", "Labels for texts or images, with their probabilities; numbers of a regression."),
    "generate": ("generate:generate", "Write text with an adapter, from a prompt or in a conversation."),
    "serve": ("serve:serve", "Serve adapters of one base model, by name, to OpenAI's clients."),
    "inspect": ("inspect:inspect", "What is in an adapter, and whether it is whole."),
    "diff": ("diff:diff", "How two adapters differ, in their configs and in what they do."),
    "merge": ("merge:merge", "Write the model with its adapter merged into its weights."),
    "convert": ("convert:convert", "Turn an adapter into a LoRA, or a large file into a small one."),
    "push": ("push:push", "Upload an adapter to the hub, with a model card."),
    "bench": ("bench:bench", "Measure what training costs on this machine."),
    "doctor": ("doctor:doctor", "Versions, devices, and which products run on this machine."),
    "report": ("report:report", "Write one HTML file about runs, side by side."),
    "demo": ("demo:demo", "Fine-tune a real model on real sentences in five ways, and compare them."),
}
"""Module and function within `randlora.cli`, and the first line of the function's docstring, by subcommand."""

_CONTEXT = {"help_option_names": ["-h", "--help"]}


class _Command(TyperCommand):
    """A subcommand that imports the package only when run, neither for help nor for the error on an unknown flag."""

    def invoke(self, ctx: Any) -> Any:
        _import_package()
        return super().invoke(ctx)


class _LazyGroup(TyperGroup):
    """A group that imports a subcommand only when called, and lists all subcommands without importing any."""

    _lists = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        place, summary = COMMANDS[cmd_name]
        return TyperCommand(cmd_name, help=summary) if self._lists else _load(cmd_name, place)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Resolve a command as click does; the error for an unknown name suggests a similar one."""
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and near and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._lists = True
        super().format_help(ctx, formatter)


def _load(name: str, place: str) -> Any:
    _postpone_package()
    module, _, function = place.partition(":")
    command = getattr(importlib.import_module(f"randlora.cli.{module}"), function)
    # typer would keep the source's line breaks within paragraphs
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    single = _typer(add_completion=False)
    single.command(name, cls=_Command, help="\n\n".join(" ".join(text.split("\n")) for text in paragraphs))(command)
    return typer.main.get_command(single)


def _postpone_package() -> None:
    """Put an empty package in ``sys.modules``, so that importing its modules does not run the package itself."""
    spec = importlib.util.find_spec("randlora")
    if "randlora" not in sys.modules and spec is not None:
        sys.modules["randlora"] = importlib.util.module_from_spec(spec)


def _import_package() -> None:
    """Import the package, and silence talkative loggers for good: libraries import each other later too."""
    quiet = importlib.import_module("randlora.quiet")
    for logger in (*quiet.TALKATIVE, "datasets.packaged_modules"):  # datasets repeats an error of ours
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    package = sys.modules["randlora"]
    if not hasattr(package, "__version__") and package.__spec__ is not None and package.__spec__.loader is not None:
        package.__spec__.loader.exec_module(package)


def _typer(**kwargs: Any) -> typer.Typer:
    return typer.Typer(
        pretty_exceptions_enable=False,
        context_settings=_CONTEXT,
        rich_markup_mode="rich",
        **kwargs,
    )


app = _typer(name="randlora", cls=_LazyGroup, no_args_is_help=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"randlora {version('randlora')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: bool = typer.Option(False, "--version", help="Show the version.", callback=_version, is_eager=True),
) -> None:
    """Full-rank parameter-efficient fine-tuning."""


def main() -> None:
    """Run the command. Exit code 2 means a mistake of the user, 1 a failure, 130 an interruption."""
    try:
        app(prog_name="randlora")
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("randlora", "randlora_cli"):
            raise
        print(f"error: the command needs the package {error.name!r}: pip install 'randlora[train]'", file=sys.stderr)
        sys.exit(2)
