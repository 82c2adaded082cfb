"""`randlora compare`."""

from __future__ import annotations

import inspect
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.console import Console

from randlora.cli.console import answering, plain_table, print_json
from randlora.cli.train import flags_of, given, parameter
from randlora.train.compare_settings import DECIDED, CompareSettings
from randlora.train.settings import read_settings

if TYPE_CHECKING:
    from randlora.report.comparison import Comparison
    from randlora.train.compare import Measured, Prepared


def compare(**flags: Any) -> None:
    """Try the methods on your data in a given time: does full rank help?

    RandLoRA, LoRA with as many trainable values, full fine-tuning and the head alone each get a learning rate from
    short runs on a part of the training data, and then the same runs of several seeds. The plan is shown first: what is
    too long for the time is shortened. The end is a table with intervals, the answer in words, and a report.

    Settings come from a YAML file, from flags, or from both, as for `randlora train`. Ctrl-C stops; the same command
    with --resume goes on.

    [bold]Examples[/]

      randlora compare --model bert-base-uncased --data reviews.csv --minutes 60

      randlora compare --model bert-base-uncased --data reviews.csv --ranks 4,16,64 --dry-run
    """
    start = monotonic()
    config, as_json, dry_run, resume = (flags.pop(name) for name in ("config", "json", "dry_run", "resume"))
    with answering(as_json, "go on by the same command with --resume") as out:
        settings = read_settings(CompareSettings, config, given(flags, CompareSettings))
        result = _plan(settings, out) if dry_run else _compare(settings, resume, start, out)
    if as_json:
        print_json(result)


def _plan(settings: CompareSettings, out: Console) -> dict[str, Any]:
    from dataclasses import asdict

    from randlora.train.compare import only_plan

    ready = only_plan(settings, lambda text: out.print(text, markup=False))
    _show_plan(ready, out)
    out.print("Nothing was trained.")
    return {"plan": asdict(ready.plan), "costs": {name: asdict(cost) for name, cost in ready.costs.items()}}


def _compare(settings: CompareSettings, resume: bool, start: float, out: Console) -> dict[str, Any]:
    from randlora.train.compare import prepare, repeat, search_rates

    def say(text: str) -> None:
        out.print(text, markup=False)

    ready = prepare(settings, resume, say)
    _show_plan(ready, out)
    deadline = start + 60 * settings.minutes
    measured = repeat(ready, search_rates(ready, deadline, say), deadline, say)
    result = _finish(ready, measured, monotonic() - start, out)
    out.print(f"{_minutes(result['seconds'])} minutes" + (" since --resume" if resume else ""))
    return result


def _show_plan(ready: Prepared, out: Console) -> None:
    from randlora.train.time_plan import RATES

    plan, costs = ready.plan, ready.costs
    rows = [
        [
            one.label,
            f"{costs[one.name].trainable:,}",
            f"{costs[one.name].step:.3g}",
            _minutes(_seconds(ready, one.name)),
        ]
        for one in ready.candidates
    ]
    out.print(plain_table(["method", "trainable", "s/step", "minutes"], rows, "The plan"))
    out.print(
        f"First a learning rate for each, by about {RATES} runs of {plan.search_steps} steps on a part of the training "
        f"data: {_minutes(plan.search_seconds)} minutes."
    )
    out.print(
        f"Then {plan.seeds} seeds of {plan.steps} steps: {_minutes(plan.seconds - plan.search_seconds)} minutes. "
        f"Together {_minutes(plan.seconds)} of {ready.settings.minutes:g}."
    )
    if plan.steps < plan.whole_run:
        out.print(
            f"[bold yellow]Shortened:[/] the settings ask for {plan.whole_run} steps. --minutes "
            f"{plan.minutes_for_whole} allows them."
        )


def _seconds(ready: Prepared, name: str) -> float:
    times = ready.times.of(ready.costs[name])
    return times.start + times.search(ready.plan.search_steps) + ready.plan.seeds * times.round(ready.plan.steps)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def _finish(ready: Prepared, measured: list[Measured], seconds: float, out: Console) -> dict[str, Any]:
    from randlora.report.page import write_report
    from randlora.report.table import markdown
    from randlora.tuner.files.atomic import write_json, write_text

    comparison = _comparison(ready, measured)
    out.print(plain_table(comparison.columns, comparison.rows, f"{ready.settings.model} on {ready.settings.data}"))
    out.print(comparison.note, markup=False)
    for sentence in comparison.answer:
        out.print(f"\n{sentence}", markup=False)
    result = comparison.as_json() | {"seconds": seconds}
    write_json(result, ready.folder, "comparison.json")
    text = "\n\n".join([markdown(comparison.columns, comparison.rows).rstrip(), comparison.note, *comparison.answer])
    write_text(ready.folder / "comparison.md", text + "\n")
    page = ready.folder / "report.html"
    with out.status("reading the runs"):
        write_report([one.runs[0] for one in measured], page, comparison=comparison)
    out.print(f"\ntable: {ready.folder / 'comparison.md'}", markup=False)
    out.print(f"report: {page} (open it in a browser)", markup=False)
    return result


def _comparison(ready: Prepared, measured: list[Measured]) -> Comparison:
    from randlora.report.comparison import Comparison, Method
    from randlora.report.runs import read_runs
    from randlora.train.compare import forgetting_of

    forgetting = forgetting_of(ready.settings)
    labels = {one.candidate.name: one.candidate.label for one in measured}
    return Comparison(
        [
            Method(
                label=one.candidate.label,
                rate=one.found.rate,
                enclosed=one.found.enclosed,
                trainable=ready.costs[one.candidate.name].trainable,
                runs=tuple(read_runs(one.runs)),
                forgotten=one.forgotten,
                lora=labels.get(one.candidate.lora or ""),
            )
            for one in measured
        ],
        "" if forgetting is None else forgetting.unit,
    )


def _signature() -> inspect.Signature:
    own = [
        parameter("config", str | None, None, "YAML file of settings.", "-c"),
        parameter("resume", bool, False, "Go on with the comparison in output-dir."),
        parameter("dry_run", bool, False, "Measure and plan; leave nothing."),
        parameter("json", bool, False, "Print the result as JSON on stdout."),
    ]
    return inspect.Signature([*own, *flags_of(CompareSettings, DECIDED)])


compare.__signature__ = _signature()  # type: ignore[attr-defined]
