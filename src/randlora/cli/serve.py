"""`randlora serve`."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from randlora.cli.console import answering, print_json
from randlora.errors import ConfigError, RandLoraError

if TYPE_CHECKING:
    from randlora.serve.adapters import Adapters
    from randlora.serve.keys import Keys

_KEY = "RANDLORA_API_KEY"


def serve(
    adapters: list[str] | None = typer.Argument(
        None, help="Folders of runs or adapters, or folders of several; NAME=PATH gives one another name."
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen at."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port; 0 takes a free one."),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapters' configs say."),
    batch_size: int = typer.Option(8, min=1, help="Most requests to compute together."),
    load_from: Path | None = typer.Option(
        None, exists=True, file_okay=False, help="Let requests load adapters from this folder, and unload any."
    ),
    api_key: list[str] | None = typer.Option(
        None, help="Key that requests must have; give it again for several. Default: RANDLORA_API_KEY, if set."
    ),
    json: bool = typer.Option(False, "--json", help="Print the address and the names as JSON on stdout."),
) -> None:
    """Serve adapters of one base model, by name, to OpenAI's clients.

    The server is Transformers' own. A request's model is an adapter's name, or the base model's. Requests for different
    adapters are computed in one batch. Without --api-key, whoever reaches the address can use the server.

    [bold]Examples[/]

      randlora serve runs/law runs/code --port 8000

      randlora serve adapters/ --load-from adapters/
    """
    stdout = sys.stdout
    with answering(json) as out:
        _require_packages()
        from randlora.serve.server import make_app

        keys = _keys(api_key)
        served = _load(adapters or [], model, out)
        with _listening(host, port) as sock:
            url = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}/v1"
            names = [one.name for one in served.served]
            place = f"{url}, with an API key" if keys else url
            out.print(f"{_counted(names[1:])} on {names[0]} at {place}; Ctrl-C ends it", markup=False)
            if json:  # clients need the address while the server runs
                with redirect_stdout(stdout):
                    print_json({"url": url, "models": names})
                stdout.flush()
            _run(make_app(served, batch_size, load_from, keys), sock)
        out.print("ended")


def _keys(given: list[str] | None) -> Keys | None:
    """Return the keys of the command line, or that of the environment.

    Raises:
        ConfigError: if a key cannot be used. An empty variable is one that a script failed to fill: without a key the
            server would be open.
    """
    from randlora.serve.keys import Keys

    if given:
        return Keys(given)
    return Keys([os.environ[_KEY]]) if _KEY in os.environ else None


def _load(words: list[str], model: str | None, out: Console) -> Adapters:
    """Load the adapters named on the command line and return them.

    A faulty adapter within a folder of several is skipped with a warning.

    Raises:
        RandLoraError: if a faulty adapter was named itself.
        ConfigError: if none of the adapters can be served.
    """
    from randlora.serve.adapters import Adapters
    from randlora.serve.named_paths import named_paths

    wanted = named_paths(words)
    with out.status("loading") as status:
        adapters = Adapters.for_paths([one.path for one in wanted], model)
        for number, one in enumerate(wanted, 1):
            status.update(f"loading adapter {number:,} of {len(wanted):,}")
            try:
                adapters.load(one.name, one.path)
            except RandLoraError as error:
                if not one.found:
                    raise
                warnings.warn(f"not served: {error}", stacklevel=1)
    if wanted and len(adapters.served) == 1:
        raise ConfigError("none of the adapters can be served")
    return adapters


def _counted(names: list[str]) -> str:
    few = ": " + ", ".join(names) if 0 < len(names) <= 10 else ""
    return f"{len(names):,} adapter{'' if len(names) == 1 else 's'}{few}"


def _require_packages() -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ConfigError("serve needs FastAPI, Uvicorn and OpenAI's types: pip install 'randlora[serve]'")


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"cannot listen at host={host!r}, port={port}: {error.strerror or error}") from None


def _run(app: Any, sock: socket.socket) -> None:
    """Run the server until Ctrl-C. Texts that are being written then get five more seconds."""
    import uvicorn

    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run([sock])
