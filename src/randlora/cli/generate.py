"""`randlora generate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from randlora.cli.console import answering, print_json
from randlora.errors import ConfigError

if TYPE_CHECKING:
    from randlora.train.trained import Trained


def generate(
    adapter: str = typer.Argument(help="Folder of a run, an adapter or a model."),
    prompt: str | None = typer.Option(None, help="What to go on from; without it, a conversation, or stdin if piped."),
    max_new_tokens: int = typer.Option(200, help="Most tokens to write."),
    temperature: float = typer.Option(0.7, help="Of the sampling; 0 always takes the most probable token."),
    top_p: float = typer.Option(0.95, help="Sample among the tokens that together have this probability."),
    seed: int | None = typer.Option(None, help="Of the sampling."),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapter's config says."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Write text with an adapter, from a prompt or in a conversation.

    Text appears as it is written. In a conversation Ctrl-C ends an answer and Ctrl-D the conversation; models without
    a chat template go on from each line that you type.

    [bold]Examples[/]

      randlora generate runs/language-model --prompt "The film"

      randlora generate runs/language-model
    """
    with answering(json) as out:
        from functools import partial

        from randlora.train.infer import generate_text
        from randlora.train.trained import load_trained

        talks = prompt is None and sys.stdin.isatty()
        if talks and json:
            raise ConfigError("--json needs --prompt, or text piped into this command")
        given = prompt if prompt is not None or talks else sys.stdin.read().rstrip("\n")
        trained = load_trained(adapter, model)
        write = partial(
            generate_text,
            trained,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        if talks:
            _converse(trained, write, out)
        else:
            text = write(given or "", on_text=_ignore if json else _show)
    if json:
        print_json({"prompt": given, "text": text})
    elif not talks:
        print()


def _converse(trained: Trained, write: object, out: Console) -> None:
    """Hold a conversation until the end of the input."""
    chats = bool(getattr(trained.processor, "chat_template", None))
    out.print(f"{trained.path} on {trained.base}; Ctrl-C ends an answer, Ctrl-D the conversation")
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("> ")
        except EOFError:
            out.print()
            return
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        try:
            answer = write(messages if chats else said, on_text=_show)  # type: ignore[operator]
        except KeyboardInterrupt:
            messages.pop()
            answer = ""
        if answer:
            messages.append({"role": "assistant", "content": answer})
        print()


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(_text: str) -> None:
    pass
