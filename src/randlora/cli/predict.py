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

from randlora.cli.console import answering, one_or_several, print_json
from randlora.errors import ConfigError
from randlora.train.settings import TaskName

if TYPE_CHECKING:
    from randlora.train.infer import Answer
    from randlora.train.settings import TrainSettings

_ENDINGS = (".csv", ".jsonl")
_FOUND = ("predicted", "confidence")  # names as in a run's predictions.jsonl


def predict(
    adapter: str = typer.Argument(help="Folder of a run, an adapter or a model."),
    text: list[str] | None = typer.Argument(
        None, help="Texts, or image files; without them and --data, one a line from stdin. Pairs: two by two."
    ),
    data: list[str] | None = typer.Option(
        None, help="Texts or images in data, as for training; labels are not needed."
    ),
    output: Path | None = typer.Option(None, help="Write here instead of printing: a .csv or a .jsonl file."),
    model: str | None = typer.Option(None, help="Base model, if it is not where the adapter's config says."),
    task: TaskName | None = typer.Option(None, help="If it is not known."),
    input_column: list[str] | None = typer.Option(
        None, help="Column of the texts or images; by default the run's. Twice for pairs of texts."
    ),
    encoding: str | None = typer.Option(None, help="Of files of text, such as cp1252; by default UTF-8."),
    batch_size: int = typer.Option(32, min=1, help="Texts at a time."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Labels for texts or images, with their probabilities; numbers of a regression.

    Printed are label, probability and text or file, separated by tabs; several labels are parted by ";" and have the
    probability of the least certain decision; of tags one line for each word, and an empty one after each text.

    Texts are arguments, or come from --data or stdin. Pairs of texts are two arguments each; on stdin a tab parts them.

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
        if output is not None:  # fail before the model is loaded
            _require_writable(output)
        given: Sequence[Any] = [] if data else text or _lines()
        columns = one_or_several(input_column)
        trained = load_trained(adapter, model, task)
        headings: dict[str, str] = {}
        if data:
            rows, given = _read(data, trained.settings_for(data, columns, encoding=encoding))
            if output is not None:  # nothing else needs the cells, which are read once more
                rows, headings = _as_written(rows, data, encoding)
        elif isinstance(columns, list) or (columns is None and trained.reads_pairs):
            given = _pairs(given, from_stdin=not text)
            rows = [dict(zip(("text", "text_pair"), one, strict=True)) for one in given]
        else:
            rows = [{"text": one} for one in given]
        found = list(predict_labels(trained, given, batch_size))
        if output is not None:
            _write(output, headings, rows, found)
            out.print(f"{len(found):,} predictions in {output}", markup=False)
    if json:
        print_json({"predictions": [_fields(one) for one in found]})
    elif output is None:
        for one in found:
            _show(one)


def _lines() -> list[str]:
    """Return the lines of stdin.

    Raises:
        ConfigError: if stdin is a terminal or empty.
    """
    if sys.stdin.isatty():
        raise ConfigError("no texts: give some, or --data, or pipe one a line into this command")
    given = [line.rstrip("\n") for line in sys.stdin]
    if not given:
        raise ConfigError("there are no texts to label")
    return given


def _pairs(given: Sequence[str], from_stdin: bool) -> list[tuple[str, str]]:
    """Return pairs of texts, from lines with a tab between the two texts or from arguments two by two.

    Raises:
        ConfigError: if the number of arguments is odd, or a line has not exactly one tab.
    """
    if not from_stdin:
        if len(given) % 2:
            raise ConfigError(f"the model reads pairs of texts, and {len(given)} texts are no pairs: {given[-1]!r}")
        return list(zip(given[::2], given[1::2], strict=True))
    parted = [line.split("\t") for line in given]
    wrong = next((line for line, parts in zip(given, parted, strict=True) if len(parts) != 2), None)
    if wrong is not None:
        raise ConfigError(f"the model reads pairs of texts, parted by a tab; this line has no such: {wrong!r}")
    return [(one, other) for one, other in parted]


def _read(data: list[str], settings: TrainSettings) -> tuple[Sequence[Mapping[str, Any]], list[Any]]:
    """Return the rows of the data, and the inputs for the model.

    In the rows labels are names, and images are replaced by the paths of their files.
    """
    from datasets import ClassLabel, Image

    from randlora.train.data import load_inputs

    rows, given = load_inputs(data, settings)
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    kept = rows.remove_columns(images)
    names = {name: feature.names for name, feature in kept.features.items() if isinstance(feature, ClassLabel)}

    def shown(key: str, value: Any) -> Any:  # without a label, a value is -1 or None
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


def _as_written(
    rows: Sequence[Mapping[str, Any]], data: list[str], encoding: str | None
) -> tuple[Sequence[Mapping[str, Any]], dict[str, str]]:
    """Return rows with their cells as written, if all data is CSV, and the headings by the columns' names."""
    from randlora.train.files import CELLS, cells_of, kind_of

    if any(kind_of(Path(one)) not in CELLS for one in data):
        return rows, {}
    headings: dict[str, str] = {}
    cells: list[dict[str, str]] = []
    for one in data:
        named, written = cells_of(one, encoding)
        headings |= named
        cells += written
    return [{**row, **written} for row, written in zip(rows, cells, strict=True)], headings


def _write(
    output: Path, headings: Mapping[str, str], rows: Sequence[Mapping[str, Any]], found: Sequence[Answer]
) -> None:
    from randlora.tuner.files.atomic import write_text

    if output.suffix == ".jsonl":
        write_text(output, "".join(f"{json_format.dumps(_fields(one), ensure_ascii=False)}\n" for one in found))
        return
    names = list(_cells(found[0]))
    taken = [name for name in names if name in rows[0]]
    if taken:
        raise ConfigError(f"the data has the columns {taken} already: rename them, or write a .jsonl file")
    table = io.StringIO(newline="")
    columns = [*rows[0], *names]
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writerow({name: headings.get(name, name) for name in columns})
    for row, one in zip(rows, found, strict=True):
        writer.writerow({**row, **_cells(one)})
    write_text(output, table.getvalue())


def _fields(one: Answer) -> dict[str, Any]:
    """Return the fields of an answer, without ``text_pair`` if the text is not a pair."""
    return {name: value for name, value in asdict(one).items() if (name, value) != ("text_pair", None)}


def _cells(one: Answer) -> dict[str, Any]:
    """Return the prediction and its confidence: of tags or several labels, the least certain; of numbers, none."""
    from randlora.train.infer import Estimate, Labelled, Prediction
    from randlora.train.tasks.multi_label import BETWEEN

    if isinstance(one, Estimate):
        return {"predicted": one.value}
    if isinstance(one, Prediction):
        values: tuple[Any, Any] = one.label, one.probabilities[one.label]
    elif isinstance(one, Labelled):
        values = BETWEEN.join(one.labels), min(max(share, 1 - share) for share in one.probabilities.values())
    else:
        values = " ".join(one.labels), min(one.probabilities, default=1.0)
    return dict(zip(_FOUND, values, strict=True))


def _show(one: Answer) -> None:
    """Print an answer with tabs between its fields. ``print`` keeps the tabs, which rich would expand."""
    from randlora.train.infer import Estimate, Tagged

    if isinstance(one, Tagged):
        for word, label, share in zip(one.words, one.labels, one.probabilities, strict=True):
            print(f"{label}\t{share:.3f}\t{word}")
        print()
        return
    label, *confidence = _cells(one).values()
    first = f"{label:.6g}" if isinstance(one, Estimate) else label
    texts = [one.text] if one.text_pair is None else [one.text, one.text_pair]
    print("\t".join([first, *(f"{share:.3f}" for share in confidence), *texts]))
