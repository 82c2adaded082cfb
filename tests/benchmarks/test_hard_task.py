"""The hard task on a model of a few thousand values, and the choice of its runs on results that were made up."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from benchmarks.hard_task import data, methods, model, page, runs, settings, study, summary
from benchmarks.hard_task.kinds import DrawnStructured, OrthogonalDense
from benchmarks.hard_task.runs import Run
from benchmarks.hard_task.settings import QUICK, STUDY, Pretraining, Task

from randlora import RandLoraLayer
from randlora.ops.bases import BasisSpec, Structured

TINY = Task(Pretraining(1, 32, 64, 2, 32, steps=30, batch=8), steps=4, windows=8, ranks=(8,), seeds=2)
DENSE = "RandLoRA, dense"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hard_task")


def count(adapted: torch.nn.Module) -> int:
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


class TestTexts:
    def test_what_is_held_out_is_nowhere_in_what_is_trained_on(self):
        for text in (data.source(), data.english()):
            train = text.train.numpy().tobytes()
            window = data.spread(text.held_out, 50, 200)
            assert sum(bytes(one.tolist()) in train for one in window) <= 2  # licences and the like repeat
            assert 0.02 < len(text.held_out) / len(text.train) < 0.3

    def test_modules_of_one_family_stay_together(self):
        names = (
            "decimal.py",
            "_pydecimal.py",
            "pickle.py",
            "_compat_pickle.py",
            "collections/abc.py",
            "_collections_abc.py",
        )
        families = [data.family(Path(name)) for name in names]
        assert families == ["decimal", "decimal", "pickle", "compat", "collections", "collections"]

    def test_windows_are_spread_from_the_first_byte_to_the_last(self):
        assert data.spread(torch.arange(10), 3, 2).tolist() == [[0, 1], [4, 5], [8, 9]]


class TestBudgets:
    @pytest.mark.parametrize("r", STUDY.ranks)
    def test_all_methods_with_a_budget_train_the_same_number_of_values(self, r):
        base = model.build(STUDY.base).requires_grad_(False)
        budget = methods.budget(base, r)
        for name, method in methods.METHODS.items():
            if r in study.budgets(method, STUDY):
                adapted = method.adapt(model.build(STUDY.base).requires_grad_(False), r, 0)
                assert count(adapted) == budget, name

    def test_vera_would_need_a_rank_far_beyond_the_width(self):
        base = model.build(STUDY.base).requires_grad_(False)
        outputs = sum(out for out, _ in methods.shapes(base, methods.TARGETS))
        rank = methods.vera_rank(base, STUDY.ranks[0])
        assert 8 * rank + outputs == methods.budget(base, STUDY.ranks[0])  # eight layers
        assert rank > 7 * STUDY.base.hidden

    def test_full_fine_tuning_trains_everything(self):
        base = model.build(TINY.base)
        assert count(methods.full(base, 0, 0)) == sum(p.numel() for p in base.parameters())


class TestKinds:
    def test_columns_are_orthogonal_or_drawn(self):
        def products(kind):
            stored = kind.draw(BasisSpec(8, 64, 192, 0, kind, 64, 192))
            _, B = stored.tensors(torch.device("cpu"), torch.float64)
            assert B.abs().unique().tolist() == [1]
            return B.T @ B / 192 - torch.eye(64)

        assert not products(OrthogonalDense()).any()
        assert not products(Structured(2)).any()
        assert products(DrawnStructured(2)).any()

    @pytest.mark.parametrize("name", [f"{DENSE}, orthogonal B", "RandLoRA, 8 groups, drawn Q_b"])
    def test_a_method_has_the_kind_that_its_name_says(self, name, folder):
        adapted = runs.adapted(methods.METHODS[name], TINY, 8, 0, folder)
        found = {layer.basis("default").spec.kind for layer in adapted.modules() if isinstance(layer, RandLoraLayer)}
        assert found == {OrthogonalDense() if "dense" in name else DrawnStructured(8)}


class TestModel:
    def test_pretraining_happens_once_and_learns_english(self, folder):
        first = model.pretrained(TINY.base, folder)
        new = model.build(TINY.base)
        windows = data.spread(data.english().held_out, 64, TINY.base.context)
        assert model.bits_per_byte(first, windows) < model.bits_per_byte(new, windows) - 0.5
        (path,) = folder.glob("base-*.safetensors")
        before = path.stat().st_mtime_ns
        again = model.pretrained(TINY.base, folder)
        assert path.stat().st_mtime_ns == before
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))

    def test_bits_of_a_model_that_knows_nothing_are_eight(self):
        blank = model.build(TINY.base)
        torch.nn.init.zeros_(blank.transformer.wte.weight)
        assert model.bits_per_byte(blank, torch.randint(256, (5, 32))) == pytest.approx(8)

    def test_the_rate_rises_then_falls(self):
        factors = [model.factor(step, 20) for step in range(20)]
        assert factors[:3] == [0.5, 1.0, 1.0]
        assert factors[-1] == pytest.approx(1 / 18)


class TestRuns:
    def test_a_run_is_repeated_to_the_last_bit(self, folder):
        run = Run(DENSE, 8, 1e-2, 1)
        first, again = (runs.outcome(run, TINY, folder) for _ in range(2))
        assert first["source"] == again["source"] != runs.untouched(TINY, folder)["source"]
        assert first["source"] != runs.outcome(Run(DENSE, 8, 1e-2, 2), TINY, folder)["source"]

    def test_a_loss_that_is_no_number_ends_a_run(self, folder):
        result = runs.outcome(Run(DENSE, 8, math.inf, 0), TINY, folder)
        assert (result["source"], result["english"]) == (None, None)

    def test_gamma_has_a_rate_and_a_start_of_its_own(self, folder):
        plain, tenth = (methods.METHODS[name] for name in (DENSE, f"{DENSE}, γ start / 10"))
        usual, less = (runs.adapted(method, TINY, 8, 0, folder) for method in (plain, tenth))
        for (name, a), (_, b) in zip(usual.named_parameters(), less.named_parameters(), strict=True):
            torch.testing.assert_close(b, a * 0.1 if runs.is_gamma(name) else a)
        slow = methods.METHODS[f"{DENSE}, γ rate / 4"]
        gammas = {id(p) for name, p in usual.named_parameters() if runs.is_gamma(name)}
        rates = {id(p) in gammas: group["lr"] for group in runs.rated(slow, usual, 0.4) for p in group["params"]}
        assert rates == {True: 0.1, False: 0.4}


def made_up(task, best):
    """The study on results that follow from the rate alone: the nearer to the best one, the better."""
    results = {}
    while True:
        missing = [run for run in study.wanted(task, results) if run not in results]
        if not missing:
            return results
        run = missing[0]
        results[run] = {"rate": run.rate, "seed": run.seed, "source": 1 + abs(math.log2(run.rate / best))}


class TestStudy:
    def test_the_middle_rates_of_the_first_budget_come_first(self):
        order = list(study.wanted(STUDY, {}))
        first = [cell for cell in study.cells(STUDY) if cell[1] in (0, 32) and not methods.METHODS[cell[0]].variant]
        assert [(run.method, run.r) for run in order[: 2 * len(first)]] == [cell for cell in first for _ in range(2)]

    @pytest.mark.parametrize("best", [1e-5, 1e-3, 3e-2, 5.0])
    def test_no_best_rate_is_at_an_edge(self, best):
        results = made_up(TINY, best)
        for name, r in study.cells(TINY):
            tried = study.rates(name, r, results)
            place = tried.index(study.settled(name, r, results))
            assert abs(math.log2(tried[place] / best)) <= 0.5
            assert study.BELOW <= place < len(tried) - study.ABOVE

    def test_seeds_are_run_at_the_best_rate_only(self):
        results = made_up(TINY, 1e-2)
        for name, r in study.cells(TINY):
            best = study.settled(name, r, results)
            others = {(run.rate, run.seed) for run in results if (run.method, run.r) == (name, r) and run.seed}
            assert others == {(best, seed) for seed in range(1, TINY.seeds)}

    def test_a_run_that_is_done_is_not_done_again(self, folder, monkeypatch):
        monkeypatch.setattr(study, "METHODS", {DENSE: methods.METHODS[DENSE]})
        calls = []

        def outcome(run, task, folder):
            calls.append(run)
            return {
                "method": run.method,
                "r": run.r,
                "rate": run.rate,
                "seed": run.seed,
                "source": 1 + abs(run.rate - 0.016),
            }

        monkeypatch.setattr(study, "outcome", outcome)
        with ThreadPoolExecutor(2) as pool:
            results = study.complete(TINY, folder, pool, workers=2)
            assert sorted(calls, key=str) == sorted(results, key=str)
            study.file_of(TINY, folder).write_text(study.file_of(TINY, folder).read_text().partition("\n")[0] + "\n")
            assert study.complete(TINY, folder, pool, workers=2) == results
        assert len(calls) == 2 * len(results) - 1


class TestTables:
    def test_rates_near_the_best_are_without_a_gap(self):
        swept = [{"rate": rate, "source": source} for rate, source in enumerate((2.05, 2.3, 2.05, 2.0, 2.09, None))]
        assert summary.near(swept) == (2, 4)

    def test_lost_runs_are_told(self):
        assert summary.measured([2.0, None, 2.0]) == "1 of 3 lost"
        assert summary.measured([2.0, 2.2]) == "2.100 ± 0.141"

    def test_every_row_of_the_study_is_in_a_table(self):
        results = made_up(TINY, 1e-2)
        for run, result in results.items():
            result |= {"method": run.method, "r": run.r, "trainable": 7, "english": 2.5}
        costs = {cell: {"seconds": 0.1, "× frozen": 1.5, "file": 9} for cell in study.cells(TINY)}
        rows = summary.rows(TINY, results, costs, {"source": 4.0, "english": 2.25})
        assert all(set(row) >= set(summary.COLUMNS) for row in rows)
        told = page.tables(json.loads(json.dumps(rows)))
        assert list(told) == ["own", "r = 8", "variants, r = 8", "rates"]
        for row in rows:
            (line,) = [
                one
                for text in told.values()
                for one in text.splitlines()
                if f"| {row['method']} | {row['trainable']}" in one
            ]
            assert row["source"] in line
            assert row["english"] in line

    def test_the_page_has_the_tables_that_were_measured(self):
        text = (Path(__file__).parents[2] / "docs" / "hard_task.md").read_text()
        for name, table in page.tables(json.loads(page.FILE.read_text())["rows"]).items():
            assert table in text, f"{name}: run python -m benchmarks.hard_task.page and put its tables into the page"


def test_equal_settings_have_equal_names():
    assert settings.name_of(QUICK) == settings.name_of(Task(**vars(QUICK))) != settings.name_of(STUDY)
