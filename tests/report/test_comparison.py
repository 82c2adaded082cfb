"""The table of a comparison, and its answer in words."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import r2_score

from randlora.errors import ConfigError
from randlora.report.comparison import Comparison, Method
from randlora.report.page import render
from randlora.report.runs import Run
from randlora.report.table import markdown
from randlora.report.updates import Updates


def run(right: np.ndarray, **result) -> Run:
    """A classifier's run that is right where ``right`` says; every third example is "rare"."""
    names = ["rare" if number % 3 == 0 else "common" for number in range(len(right))]
    examples = [
        {"text": f"text {number}", "label": name, "predicted": name if ok else "other", "loss": 0.1}
        for number, (name, ok) in enumerate(zip(names, right, strict=True))
    ]
    result = {"result_bytes": 1000, "seconds_per_step": 0.5, "peak_memory_bytes": 2_000_000, **result}
    return Run("run", Path("run"), result=result, examples=examples)


def method(label: str, share: float, lora: str | None = None, seeds: int = 3, examples: int = 300, **more) -> Method:
    draw = np.random.default_rng(list(label.encode()))
    runs = tuple(run(draw.random(examples) < share) for _ in range(seeds))
    return Method(label, 1e-3, True, 1234, runs, lora=lora, **more)


def answer(*methods: Method) -> str:
    return " ".join(Comparison(methods).answer)


def test_the_table_has_means_over_seeds_and_what_they_cost():
    right = np.arange(100) < 80
    one = Method("RandLoRA r=8", 3e-4, True, 2146, (run(right), run(right), run(right)), (0.1, 0.2, 0.3), "LoRA r=2")
    comparison = Comparison([one], "neighbours lost")
    assert comparison.columns[:5] == ["method", "learning rate", "trainable", "accuracy (95%)", "neighbours lost"]
    cells = comparison.rows[0]
    assert cells[:3] == ["RandLoRA r=8", "0.0003", "2,146"]
    mean, low, high = map(float, re.fullmatch(r"(\S+)% \((\S+)–(\S+)\)", cells[3]).groups())
    assert (mean, low < 80 < high) == (80.0, True)
    assert cells[4:] == ["20.0% (10.0–30.0)", "0.5", "2.0 MB", "1.0 kB"]
    assert markdown(comparison.columns, comparison.rows).count("\n") == 3
    assert "3 seeds, 100 test examples" in comparison.note


def test_memory_on_a_gpu_is_shown_where_there_is_one():
    log = [{"step": step, "loss": 1.0, "device_memory_bytes": 5_000_000 * step} for step in (1, 2)]
    one = Method("RandLoRA r=8", 1e-3, True, 1, (replace(run(np.ones(3)), log=log),))
    assert Comparison([one]).rows[0][-2] == "10.0 MB"


def test_full_rank_that_helps():
    found = answer(method("RandLoRA r=8", 0.9, "LoRA r=2"), method("LoRA r=2", 0.7))
    assert "Yes: RandLoRA r=8 at 0.001 is better than LoRA" in found
    assert "RandLoRA did best with r=8 at a learning rate of 0.001" in found


def test_full_rank_that_hurts():
    assert "No: LoRA with as many values is better" in answer(
        method("RandLoRA r=8", 0.7, "LoRA r=2"), method("LoRA r=2", 0.9)
    )


def test_what_cannot_be_told_is_not_said():
    lora = method("LoRA r=2", 0.8)
    same = replace(lora, label="RandLoRA r=8", lora="LoRA r=2")
    other = replace(lora, label="RandLoRA r=32", trainable=99, lora="LoRA r=2")
    found = answer(same, other, lora)
    assert "Not that these runs could tell" in found
    assert "RandLoRA r=8 and RandLoRA r=32 cannot be told apart; RandLoRA r=32 trains fewest values" in found


def test_kinds_that_train_as_many_values_are_not_said_to_train_fewer():
    lora = method("LoRA r=2", 0.8)
    small, large = (replace(lora, label=f"RandLoRA r={r}", trainable=n, lora="LoRA r=2") for r, n in ((32, 9), (8, 99)))
    both = [replace(one, label=f"structured {one.label}") for one in (small, large)]
    assert "structured RandLoRA r=32 cannot be told apart." in answer(small, both[0], lora)
    found = answer(large, both[1], small, both[0], lora)
    assert "cannot be told apart; RandLoRA r=32 and structured RandLoRA r=32 train fewest values." in found


def test_examples_and_seeds_are_paired():
    """A method that is right wherever the other is, and once more in ten, is told from it; unpaired it would not be."""
    draw = np.random.default_rng(0)
    base = [draw.random(300) < 0.7 for _ in range(3)]
    more = np.arange(300) % 10 == 0
    ours = Method("RandLoRA r=8", 1e-3, True, 1, tuple(run(right | more) for right in base), lora="LoRA r=2")
    lora = Method("LoRA r=2", 1e-3, True, 1, tuple(run(right) for right in base))
    comparison = Comparison([ours, lora])
    gain = comparison.matched[0].gain
    assert 0 < gain.low < gain.high < 0.1
    assert comparison.score(ours).low < comparison.score(lora).high


def test_several_ranks_take_wider_intervals():
    ours, second, lora = (method(label, 0.8, partner) for label, partner in (("a", "c"), ("b", "c"), ("c", None)))
    alone = Comparison([ours, lora]).matched[0].gain
    beside = Comparison([ours, second, lora]).matched[0].gain
    assert beside.mean == alone.mean
    assert beside.high - beside.low > alone.high - alone.low


def test_full_fine_tuning_that_gains_nothing_is_a_hint():
    found = answer(method("RandLoRA r=8", 0.8, "LoRA r=2"), method("LoRA r=2", 0.8), method("full fine-tuning", 0.75))
    assert "Full fine-tuning against LoRA r=2" in found
    assert "expect little of full rank" in found


def test_a_classifier_that_learnt_the_largest_class_only_is_named():
    common = np.arange(300) % 3 != 0
    blind = Method("head alone", 1e-3, True, 1, (run(common),) * 3)
    found = answer(method("RandLoRA r=8", 0.95, "LoRA r=2"), method("LoRA r=2", 0.95), blind)
    assert "Not surely better than always saying 'common', which is right in 66.7%: head alone." in found


def test_runs_that_learnt_nothing_answer_nothing():
    """Always saying the more frequent label is far better than always saying the other, and both learnt nothing."""
    common = np.arange(300) % 3 != 0
    ours, lora, full = (
        Method(label, 1e-3, True, 1, (run(right),) * 3, lora=other)
        for label, right, other in (
            ("RandLoRA r=8", common, "LoRA r=2"),
            ("LoRA r=2", ~common, None),
            ("full fine-tuning", ~common, None),
        )
    )
    found = answer(ours, lora, full)
    assert "Not known: neither RandLoRA nor LoRA does better than always saying 'common'" in found
    assert "Yes" not in found
    assert "expect little" not in found
    assert "did best" not in found


def test_a_rate_at_the_end_of_its_search_and_few_seeds_are_said():
    found = answer(replace(method("RandLoRA r=8", 0.8, seeds=2), enclosed=False))
    assert "The rate of RandLoRA r=8 is the last that was tried on its side" in found
    assert "fewer than three seeds" in found
    assert "not known" in found


def test_language_models_are_compared_by_their_loss():
    def language(losses) -> Run:
        weights = [10, 30]
        return replace(
            run(np.ones(2)),
            examples=[{"text": str(n), "loss": loss, "tokens": weights[n]} for n, loss in enumerate(losses)],
        )

    ours = Method("RandLoRA r=8", 1e-3, True, 1, (language([1.0, 2.0]), language([1.0, 2.0])), lora="LoRA r=2")
    lora = Method("LoRA r=2", 1e-3, True, 1, (language([2.0, 3.0]), language([2.0, 3.0])))
    comparison = Comparison([ours, lora])
    assert comparison.columns[3] == "loss (95%)"
    assert comparison.score(ours).mean == pytest.approx(1.75)  # a token counts, not a text
    assert comparison.matched[0].gain.mean == pytest.approx(1.0)  # a lower loss is better


def test_tags_count_by_the_word():
    examples = [{"text": "a", "label": "x y", "predicted": "x z", "tokens": 2, "correct": 1}]
    examples += [{"text": "b", "label": "x", "predicted": "x", "tokens": 1, "correct": 1}]
    one = Method("RandLoRA r=8", 1e-3, True, 1, (replace(run(np.ones(2)), examples=examples),) * 2)
    assert Comparison([one]).score(one).mean == pytest.approx(2 / 3)


def test_runs_on_other_examples_are_refused():
    one = method("RandLoRA r=8", 0.8)
    shorter = method("LoRA r=2", 0.8, examples=200)
    with pytest.raises(ConfigError, match="not of the examples"):
        Comparison([one, shorter])


def test_the_report_begins_with_the_comparison():
    comparison = Comparison([method("<b>RandLoRA</b>", 0.8)])
    page = render([run(np.ones(4))], [Updates()], comparison)
    assert page.index('id="comparison"') < page.index('id="runs"')
    assert "&lt;b&gt;RandLoRA&lt;/b&gt;" in page
    assert "<b>RandLoRA</b>" not in page.partition('id="runs"')[0]


def numbers(errors: np.ndarray) -> Run:
    """A regression's run with these errors."""
    labels = np.arange(len(errors)) / 10
    examples = [
        {"text": f"t {n}", "label": label, "predicted": label + error, "loss": error**2}
        for n, (label, error) in enumerate(zip(labels.tolist(), errors.tolist(), strict=True))
    ]
    return Run("run", Path("run"), result={"result_bytes": 1, "seconds_per_step": 1.0}, examples=examples)


def test_numbers_are_compared_by_their_r2():
    draw = np.random.default_rng(0)
    small, large = draw.normal(0, 0.3, 90), draw.normal(0, 9, 90)
    ours = Method("RandLoRA r=8", 1e-3, True, 1, (numbers(small),), lora="LoRA r=2")
    comparison = Comparison([ours, Method("LoRA r=2", 1e-3, True, 1, (numbers(large),))])
    labels = np.arange(90) / 10
    assert comparison.columns[3] == "R² (95%)"
    assert comparison.score(ours).mean == pytest.approx(r2_score(labels, labels + small))
    text = " ".join(comparison.answer)
    assert "of R²" in text
    assert "Not surely better than always saying the mean, of which R² is 0: LoRA r=2." in text
    assert "r2" in comparison.as_json()["methods"][0]


def test_several_labels_are_compared_by_exact_matches():
    lists = [(["a", "b"], ["a", "b"]), (["a"], ["a", "b"]), ([], []), (["a"], ["a"])]
    examples = [{"text": f"{n}", "label": one, "predicted": other, "loss": 0.1} for n, (one, other) in enumerate(lists)]
    only = Run("run", Path("run"), result={"result_bytes": 1, "seconds_per_step": 1.0}, examples=examples)
    comparison = Comparison([Method("RandLoRA r=8", 1e-3, True, 1, (only,))])
    assert comparison.columns[3] == "exact match (95%)"
    assert comparison.score(comparison.methods[0]).mean == 0.75
    assert "always saying 'a', which is right in 50.0%" in " ".join(comparison.answer)
