"""`randlora predict`."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from randlora.cli.console import answering, print_json
from randlora.errors import ConfigError

if TYPE_CHECKING:
    from randlora.train.infer import Prediction, Tagged


def predict(
    adapter: str = typer.Argument(help="Folder of a run, an adapter or a model."),
    text: list[str] | None = typer.Argument(
        None, help="Texts, or image files; without them and --data, one a line from stdin."
    ),
    data: str | None = typer.Option(None, help="Texts in a file of data, as for training, or one a line in a .txt."),
    output: Path | None = typer.Option(None, help="Write JSON lines here instead of printing."),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapter's config says."),
    input_column: str = typer.Option("text", help="Column of the texts."),
    batch_size: int = typer.Option(32, min=1, help="Texts at a time."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Labels for texts or images, with their probabilities.

    Printed are label, probability and text or file, separated by tabs; of tags one line for each word, and an empty
    one after each text. Texts are arguments, or come from --data or stdin.

    [bold]Examples[/]

      randlora predict runs/reviews "a lovely film" "two hours of my life"

      randlora predict runs/reviews --data new.csv --output labels.jsonl
    """
    with answering(json, "nothing has been written") as out:
        from randlora.train.infer import predict_labels
        from randlora.train.trained import load_trained
        from randlora.tuner.files.atomic import write_text

        texts = _texts(text or [], data, input_column)
        if output is not None:  # before anything is computed
            if output.is_dir():
                raise ConfigError(f"output={str(output)!r} is a folder: name a file in it")
            output.parent.mkdir(parents=True, exist_ok=True)
        found = list(predict_labels(load_trained(adapter, model), texts, batch_size))
        if output is not None:
            write_text(output, "".join(f"{json_format.dumps(asdict(one), ensure_ascii=False)}\n" for one in found))
            out.print(f"{len(found):,} predictions in {output}")
    if json:
        print_json({"predictions": [asdict(one) for one in found]})
    elif output is None:
        for one in found:
            _show(one)


def _show(one: Prediction | Tagged) -> None:
    """With tabs, which rich would expand."""
    from randlora.train.infer import Prediction

    if isinstance(one, Prediction):
        print(f"{one.label}\t{one.probabilities[one.label]:.3f}\t{one.text}")
        return
    for word, label, share in zip(one.words, one.labels, one.probabilities, strict=True):
        print(f"{label}\t{share:.3f}\t{word}")
    print()


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

        settings = TrainSettings(model="", data=data, task="causal-lm", input_column=column)
        given = list(load_rows(data, settings)["text"])
    elif not given:
        if sys.stdin.isatty():
            raise ConfigError("no texts: give some, or --data, or pipe one a line into this command")
        given = [line.rstrip("\n") for line in sys.stdin]
    if not given:
        raise ConfigError("there are no texts to label")
    return given
