"""`randlora predict`."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path

import typer

from randlora.cli.console import answering, print_json
from randlora.errors import ConfigError


def predict(
    adapter: str = typer.Argument(help="Folder of a run, an adapter or a model."),
    text: list[str] | None = typer.Argument(None, help="Texts; without them and --data, one a line from stdin."),
    data: str | None = typer.Option(None, help="Texts in a file of data, as for training, or one a line in a .txt."),
    output: Path | None = typer.Option(None, help="Write JSON lines here instead of printing."),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapter's config says."),
    text_column: str = typer.Option("text", help="Column of the texts."),
    batch_size: int = typer.Option(32, min=1, help="Texts at a time."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Labels for texts, with their probabilities.

    Printed are label, probability and text, separated by tabs. Texts are arguments, or come from --data or stdin.

    [bold]Examples[/]

      randlora predict runs/reviews "a lovely film" "two hours of my life"

      randlora predict runs/reviews --data new.csv --output labels.jsonl
    """
    with answering(json, "nothing has been written") as out:
        from randlora.train.infer import predict_texts
        from randlora.train.trained import load_trained
        from randlora.tuner.atomic import write_text

        texts = _texts(text or [], data, text_column)
        found = list(predict_texts(load_trained(adapter, model), texts, batch_size))
        if output is not None:
            if not output.parent.is_dir():
                raise ConfigError(f"output={str(output)!r}: there is no folder {str(output.parent)!r}")
            write_text(output, "".join(f"{json_format.dumps(asdict(one), ensure_ascii=False)}\n" for one in found))
            out.print(f"{len(found):,} predictions in {output}")
    if json:
        print_json({"predictions": [asdict(one) for one in found]})
    elif output is None:
        for one in found:
            print(f"{one.label}\t{one.probabilities[one.label]:.3f}\t{one.text}")  # tabs, which rich would expand


def _texts(given: list[str], data: str | None, column: str) -> list[str]:
    if given and data is not None:
        raise ConfigError(f"data={data!r} and {len(given)} texts: give one or the other")
    if data is not None and data.endswith(".txt"):
        try:
            given = Path(data).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {data!r}: {error}") from None
    elif data is not None:
        from randlora.train.data import load_rows
        from randlora.train.settings import TrainSettings

        settings = TrainSettings(model="", data=data, task="causal-lm", text_column=column)
        given = list(load_rows(data, settings)["text"])
    elif not given:
        if sys.stdin.isatty():
            raise ConfigError("no texts: give some, or --data, or pipe one a line into this command")
        given = [line.rstrip("\n") for line in sys.stdin]
    if not given:
        raise ConfigError("there are no texts to label")
    return given
