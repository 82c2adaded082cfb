"""A report on several runs as one HTML file, which needs no network, no server and no other file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

import randlora
from randlora.errors import ConfigError
from randlora.report import charts
from randlora.report.comparison import Comparison
from randlora.report.confusion import confusion, shares
from randlora.report.runs import Entry, Run, number, read_runs
from randlora.report.summary import COLUMNS, METRICS, summary
from randlora.report.updates import Updates, measure_updates
from randlora.tuner.files.atomic import write_text

WORST = 20  # examples of a run on the page
_MOST_TEXT = 500  # characters of an example on the page


def write_report(
    folders: Sequence[Path],
    output: Path,
    say: Callable[[str], None] = lambda _: None,
    comparison: Comparison | None = None,
) -> Path:
    """Read runs and write the report, whole or not at all.

    Args:
        folders: runs of ``randlora train``, or folders with an adapter of PEFT or checkpoints of the Trainer.
        output: the HTML file.
        say: called with the run, and the layer, that is being read.
        comparison: a comparison with which the page begins; the runs belong to it.

    Returns:
        ``output``.

    Raises:
        ConfigError: if a folder is not a run, or the output cannot be written.
    """
    runs = read_runs(folders)
    updates = []
    for run in runs:
        say(run.name)
        tick = lambda layer, name=run.name: say(f"{name}: {layer}")  # noqa: E731
        updates.append(Updates() if run.adapter is None else measure_updates(run.adapter, run.base, tick))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, render(runs, updates, comparison))
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {str(output)!r}: {error.strerror}") from error
    return output


def render(runs: Sequence[Run], updates: Sequence[Updates], comparison: Comparison | None = None) -> str:
    """Return the page. Strings from runs are escaped: text by the template, data by ``_data``."""
    asset = files("randlora.report") / "assets"
    plotly, script = get_plotlyjs(), (asset / "report.js").read_text(encoding="utf-8")
    plots = charts.curves(runs), [*charts.metrics(runs), *charts.predicted(runs)]
    layers = charts.layers(updates)
    sections = [_section(run, one) for run, one in zip(runs, updates, strict=True)]
    places = [  # a column of a metric only if a run has the metric
        place
        for place, name in enumerate(COLUMNS)
        if name not in METRICS or any(section["cells"][place].text != "–" for section in sections)
    ]
    data = {"runs": [run.name for run in runs], "charts": [*plots[0], *plots[1]], "layers": layers}
    template = Environment(
        loader=PackageLoader("randlora.report", "assets"), autoescape=True, undefined=StrictUndefined
    ).get_template("report.html")
    return template.render(
        title=", ".join(run.name for run in runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else ""),
        version=randlora.__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        policy=" ".join(f"'sha256-{_digest(text)}'" for text in (plotly, script)),
        style=(asset / "report.css").read_text(encoding="utf-8"),
        plotly=plotly,
        script=script,
        data=_data(data),
        comparison=comparison,
        columns=[COLUMNS[place] for place in places],
        runs=[{**section, "cells": [section["cells"][place] for place in places]} for section in sections],
        curves=plots[0],
        metrics=plots[1],
        layers=layers,
        differing=_differing([run.settings or run.adapter_config for run in runs]),
    )


@dataclass(frozen=True)
class _Example:
    text: str
    label: str
    predicted: str
    confidence: str
    loss: str


def _section(run: Run, updates: Updates) -> Entry:
    """Return the facts about one run that the template shows."""
    matrix = None if run.settings.get("task") == "token-classification" else confusion(run.examples)
    said = (*run.remarks, updates.remark, "" if matrix is None else matrix.remark)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "cells": summary(run),
        "remarks": [remark for remark in said if remark],
        "confusion": matrix,
        "shares": shares(run.examples),
        "worst": _worst(run.examples),
        "examples": len(run.examples),
        "classified": any("label" in example for example in run.examples),
        "settings": _yaml(run.settings),
        "adapter": _yaml(run.adapter_config),
        "environment": _yaml(run.environment),
    }


def _worst(examples: Sequence[Entry]) -> list[_Example]:
    """Return the ``WORST`` examples with the largest loss; NaN counts as the largest."""

    def badness(example: Entry) -> float:
        loss = number(example.get("loss"))
        return math.inf if math.isnan(loss) else loss

    return [
        _Example(
            text=_cut(_text(example)),
            label=_answer(example.get("label", "")),
            predicted=_answer(example.get("predicted", "")),
            confidence=_form(example["confidence"], ".1%") if "confidence" in example else "–",
            loss=_form(example.get("loss"), ".3f"),
        )
        for example in sorted(examples, key=badness, reverse=True)[:WORST]
    ]


def _text(example: Entry) -> str:
    """Return the text of an example, or both texts of a pair."""
    return " | ".join(str(example[name]) for name in ("text", "text_pair") if name in example)


def _answer(value: object) -> str:
    """Return a label, a list of labels or a number as text."""
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "–"
    return str(value) if isinstance(value, str) else format(number(value), ".4g")


def _form(value: object, form: str) -> str:
    exact = number(value)
    return "no number" if math.isnan(exact) else format(exact, form)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[:_MOST_TEXT] + " …"


def _differing(settings: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the runs differ, with each run's value."""
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = [(key, [_plain(one.get(key)) for one in settings]) for key in keys if key != "output_dir"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _plain(value: object) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _yaml(content: Entry) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True) if content else ""


def _data(content: Any) -> str:
    """Return the content as JSON whose strings cannot end the script element around it."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
