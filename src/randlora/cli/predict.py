"""`randlora predict`."""

from __future__ import annotations

import csv
import io
import json as json_format
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from randlora.cli.console import answering, print_json
from randlora.errors import ConfigError
from randlora.train.settings import TaskName

if TYPE_CHECKING:
    from randlora.train.infer import Prediction, Tagged
    from randlora.train.trained import Trained

_ENDINGS = (".csv", ".jsonl")
_FOUND = ("predicted", "confidence")  # as a run's predictions.jsonl has them


def predict(
    adapter: str = typer.Argument(help="Folder of a run, an adapter or a model."),
    text: list[str] | None = typer.Argument(
        None, help="Texts, or image files; without them and --data, one a line from stdin."
    ),
    data: list[str] | None = typer.Option(
        None, help="Texts or images in data, as for training; labels are not needed."
    ),
    output: Path | None = typer.Option(None, help="Write here instead of printing: a .csv or a .jsonl file."),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapter's config says."),
    task: TaskName | None = typer.Option(None, help="If it is not known."),
    input_column: str | None = typer.Option(None, help="Column of the texts or images; by default the run's."),
    batch_size: int = typer.Option(32, min=1, help="Texts at a time."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Labels for texts or images, with their probabilities.

    Printed are label, probability and text or file, separated by tabs; of tags one line for each word, and an empty
    one after each text. Texts are arguments, or come from --data or stdin.

    A .csv file has the columns of the data, and predicted and confidence beside them; a .jsonl file has the
    probabilities of all labels.

    [bold]Examples[/]

      randlora predict runs/reviews "a lovely film" "two hours of my life"

      randlora predict runs/reviews --data new.csv --output labelled.csv
    """
    with answering(json, "nothing has been written") as out:
        from randlora.train.infer import predict_labels
        from randlora.train.trained import load_trained

        if text and data:
            raise ConfigError(f"data={data!r} and {len(text)} texts: give one or the other")
        if output is not None:  # before anything is computed
            _require_writable(output)
        given: Sequence[Any] = [] if data else text or _lines()
        trained = load_trained(adapter, model, task)
        rows: Sequence[Mapping[str, Any]] = [{"text": one} for one in given]
        if data:
            rows, given = _read(trained, data, input_column)
        found = list(predict_labels(trained, given, batch_size))
        if output is not None:
            _write(output, rows, found)
            out.print(f"{len(found):,} predictions in {output}", markup=False)
    if json:
        print_json({"predictions": [asdict(one) for one in found]})
    elif output is None:
        for one in found:
            _show(one)


def _lines() -> list[str]:
    """Of stdin."""
    if sys.stdin.isatty():
        raise ConfigError("no texts: give some, or --data, or pipe one a line into this command")
    given = [line.rstrip("\n") for line in sys.stdin]
    if not given:
        raise ConfigError("there are no texts to label")
    return given


def _read(trained: Trained, data: list[str], column: str | None) -> tuple[Sequence[Mapping[str, Any]], list[Any]]:
    """The rows without images, labels by their names, and what is to be labelled in them."""
    from datasets import ClassLabel, Image

    from randlora.train.data import load_inputs

    rows, given = load_inputs(data, trained.settings_for(data, column))
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    kept = rows.remove_columns(images)
    names = {name: feature.names for name, feature in kept.features.items() if isinstance(feature, ClassLabel)}

    def shown(key: str, value: Any) -> Any:  # data without labels has -1, or nothing
        return (names[key][value] if (-1 if value is None else value) >= 0 else "") if key in names else value

    table = [{key: shown(key, value) for key, value in row.items()} for row in kept]
    if images:
        table = [{"file": one["path"], **row} for one, row in zip(given, table or [{}] * len(given), strict=True)]
    return table, given


def _require_writable(output: Path) -> None:
    if output.is_dir():
        raise ConfigError(f"output={str(output)!r} is a folder: name a file in it")
    if output.suffix not in _ENDINGS:
        raise ConfigError(f"output={str(output)!r} must end in {' or '.join(_ENDINGS)}, which says how it is written")
    output.parent.mkdir(parents=True, exist_ok=True)


def _write(output: Path, rows: Sequence[Mapping[str, Any]], found: Sequence[Prediction | Tagged]) -> None:
    from randlora.tuner.files.atomic import write_text

    if output.suffix == ".jsonl":
        write_text(output, "".join(f"{json_format.dumps(asdict(one), ensure_ascii=False)}\n" for one in found))
        return
    taken = [name for name in _FOUND if name in rows[0]]
    if taken:
        raise ConfigError(f"the data has the columns {taken} already: rename them, or write a .jsonl file")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [*rows[0], *_FOUND], lineterminator="\n")
    writer.writeheader()
    for row, one in zip(rows, found, strict=True):
        writer.writerow({**row, **_cells(one)})
    write_text(output, table.getvalue())


def _cells(one: Prediction | Tagged) -> dict[str, Any]:
    """Of tags, the confidence is that of the least certain."""
    from randlora.train.infer import Prediction

    if isinstance(one, Prediction):
        values: tuple[Any, Any] = one.label, one.probabilities[one.label]
    else:
        values = " ".join(one.labels), min(one.probabilities, default=1.0)
    return dict(zip(_FOUND, values, strict=True))


def _show(one: Prediction | Tagged) -> None:
    """With tabs, which rich would expand."""
    from randlora.train.infer import Prediction

    if isinstance(one, Prediction):
        print(f"{one.label}\t{one.probabilities[one.label]:.3f}\t{one.text}")
        return
    for word, label, share in zip(one.words, one.labels, one.probabilities, strict=True):
        print(f"{label}\t{share:.3f}\t{word}")
    print()
