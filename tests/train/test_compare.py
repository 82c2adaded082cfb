"""A comparison: its settings, its data, its course, and going on after an interruption."""

import json
import math
from pathlib import Path
from time import monotonic

import pytest
from datasets import load_from_disk

from randlora.errors import ConfigError
from randlora.train import compare, search, time_plan
from randlora.train.compare import only_plan, prepare, repeat, search_rates
from randlora.train.compare_settings import DECIDED, CompareSettings
from randlora.train.data import load_data
from randlora.train.forgetting import Forgetting
from randlora.train.run import train
from randlora.train.search import Found
from randlora.train.settings import TrainSettings, load_settings, read_settings
from randlora.train.split import keep_split


def settings(model, data, output, **values) -> CompareSettings:
    common = {"model": model, "data": data, "output_dir": str(output), "max_length": 16, "batch_size": 16}
    return read_settings(CompareSettings, None, {**common, "ranks": [8], "max_steps": 4, **values})


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Two seeds and two rates, all in this process."""
    monkeypatch.setattr(time_plan, "LEAST_SEEDS", 2)
    monkeypatch.setattr(time_plan, "MOST_SEEDS", 2)
    monkeypatch.setattr(search, "MOST", 2)
    monkeypatch.setattr(compare, "seconds_to_start", lambda: 0.0)
    monkeypatch.setattr(compare, "train_in_own_process", lambda run, offline: train(run))


class TestSettings:
    @pytest.mark.parametrize("name", DECIDED)
    def test_what_the_comparison_decides_is_refused(self, name):
        values = {"r": 8, "alpha": 2, "method": "lora", "report_to": "none", "resume": "auto", "best": "loss"}
        with pytest.raises(ConfigError, match=f"{name}: a comparison decides these itself"):
            settings("m", "d", "o", **{name: values.get(name, 1)})

    def test_lists_are_separated_by_commas(self):
        given = settings("m", "d", "o", ranks="4, 16", methods="randlora,full")
        assert (given.ranks, given.methods) == ([4, 16], ["randlora", "full"])

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"ranks": "0"}, "ranks='0'|ranks"),
            ({"methods": "lora"}, "add randlora"),
            ({"methods": "randlora,dora"}, "methods='dora'"),
            ({"minutes": 0}, "minutes=0"),
            ({"minuts": 5}, "did you mean 'minutes'"),
        ],
    )
    def test_a_bad_value_is_named(self, values, expected):
        with pytest.raises(ConfigError, match=expected):
            settings("m", "d", "o", **values)

    def test_runs_share_what_is_no_decision(self):
        run = settings("m", "d", "o", epochs=3, modules_to_save="pooler", seed=7).of_run(method="lora", r=3)
        assert type(run) is TrainSettings
        assert (run.epochs, run.modules_to_save, run.seed, run.method, run.r) == (3.0, ["pooler"], 7, "lora", 3)


class TestSplit:
    def test_runs_see_the_rows_and_labels_of_the_first(self, tmp_path, tiny_bert, reviews):
        given = load_settings(None, {"model": tiny_bert, "data": reviews, "seed": 3})
        here = keep_split(given, tmp_path)
        wanted, found = load_data(given), load_data(here.model_copy(update={"seed": 9}))
        assert found.labels == wanted.labels
        for part in ("train", "evaluation"):
            rows = [(row["text"], row["label"]) for row in getattr(wanted, part)]
            assert [(row["text"], row["label"]) for row in getattr(found, part)] == rows

    def test_a_label_without_rows_keeps_its_number(self, tmp_path, tiny_bert):
        (tmp_path / "train.csv").write_text("text,label\nx,a\ny,b\nz,c\n")
        (tmp_path / "test.csv").write_text("text,label\nw,c\nv,c\n")
        given = load_settings(
            None,
            {"model": tiny_bert, "data": str(tmp_path / "train.csv"), "eval_data": str(tmp_path / "test.csv")},
        )
        found = load_data(keep_split(given, tmp_path / "kept"))
        assert (found.labels, found.evaluation["label"][:]) == (["a", "b", "c"], [2, 2])

    def test_tags_and_columns_of_other_names(self, tmp_path, tiny_bert):
        rows = [{"words": [f"w{n}", "x"], "ner": ["O", "B-A" if n % 2 else "I-A"]} for n in range(20)]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"model": tiny_bert, "data": str(tmp_path / "d.jsonl"), "task": "token-classification"}
        given = load_settings(None, {**values, "input_column": "words", "label_column": "ner"})
        found, wanted = load_data(keep_split(given, tmp_path / "kept")), load_data(given)
        assert (found.labels, found.train["tags"][:]) == (wanted.labels, wanted.train["tags"][:])


class TestPreparation:
    def test_candidates_match_and_what_does_not_apply_is_said(self, tmp_path, tiny_llama, reviews):
        said = []
        given = settings(tiny_llama, reviews, tmp_path / "out", task="causal-lm", ranks=[4, 8])
        ready = only_plan(given, said.append)
        names = [one.name for one in ready.candidates]
        assert names[:2] == ["randlora-r4", "randlora-r8"]
        assert names[-1] == "full"
        for one in ready.candidates[:2]:
            ours, lora = (ready.costs[name].trainable for name in (one.name, one.lora))
            ranks = int(one.lora.removeprefix("lora-r"))
            assert abs(ours - lora) <= lora / ranks / 2  # half of what a rank has
        assert "head alone is left out: causal-lm has no new head" in said
        assert not (tmp_path / "out").exists()

    def test_quantised_weights_leave_full_fine_tuning_out(self, tmp_path, tiny_bert, reviews, monkeypatch):
        monkeypatch.setattr(compare, "measure_cost", lambda run: time_plan.Cost(1, 4, 0.1, 0.1, 0.001, 2))
        said = []
        ready = only_plan(settings(tiny_bert, reviews, tmp_path, quantization="4bit"), said.append)
        assert [one.name for one in ready.candidates] == ["randlora-r8", "structured-r8", "lora-r2"]
        assert any("full fine-tuning is left out: quantization='4bit'" in text for text in said)

    def test_a_single_test_example_is_refused(self, tmp_path, tiny_bert, reviews):
        (tmp_path / "one.csv").write_text("text,label\ngood,positive\n")
        given = settings(tiny_bert, reviews, tmp_path / "out", eval_data=str(tmp_path / "one.csv"))
        with pytest.raises(ConfigError, match="single row"):
            prepare(given, False, print)

    def test_several_processes_are_refused(self, tmp_path, tiny_bert, reviews, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="a comparison is for one process"):
            prepare(settings(tiny_bert, reviews, tmp_path), False, print)

    def test_too_little_time_is_refused(self, tmp_path, tiny_bert, reviews):
        with pytest.raises(ConfigError, match="minutes: "):
            only_plan(settings(tiny_bert, reviews, tmp_path, minutes=0.001, methods="randlora"), print)


@pytest.fixture
def ready(tmp_path, tiny_bert, reviews, monkeypatch):
    """A comparison that is prepared, of costs that nobody measured."""
    costs = {"randlora": time_plan.Cost(2146, 4, 1.0, 0.5, 0.001, 2)}
    plain = time_plan.Cost(1858, 4, 1.0, 0.25, 0.001)
    monkeypatch.setattr(compare, "measure_cost", lambda run: costs.get(run.method, plain))
    given = settings(tiny_bert, reviews, tmp_path / "out", methods="randlora,lora")
    return lambda resume=False: prepare(given, resume, lambda _: None)


def rates(ready) -> dict[str, Found]:
    return {one.name: Found(1e-3, {1e-3: 1.0}, True) for one in ready.candidates}


class TestCourse:
    def test_rates_are_found_on_training_data_in_turns_and_kept(self, ready, monkeypatch):
        first, said = ready(), []
        found = search_rates(first, monotonic() + 1000, said.append)
        assert [text.partition(",")[0] for text in said] == ["RandLoRA r=8", "LoRA r=2"] * 2
        assert found["randlora-r8"].rate in (3e-4, 1e-3)
        journal = (first.folder / "search/search.log").read_text()
        assert str(first.folder / "data/train") in journal
        assert str(first.folder / "data/evaluation") not in journal
        monkeypatch.setattr(compare, "Search", None)
        assert search_rates(ready(resume=True), monotonic(), said.append) == found

    def test_time_that_is_up_leaves_each_as_many_tries(self, ready, monkeypatch):
        monkeypatch.setattr(compare, "_LEAST_TURNS", 1)
        found = search_rates(ready(), monotonic(), lambda _: None)
        assert [len(one.losses) for one in found.values()] == [1, 1]
        assert not any(one.enclosed for one in found.values())

    def test_an_interrupted_comparison_goes_on_where_it_was(self, ready, monkeypatch):
        trained = []

        def interrupted(run, *_args, **_kwargs):
            if len(trained) == 3:
                raise KeyboardInterrupt
            trained.append(Path(run.output_dir))
            return train(run)

        first = ready()
        monkeypatch.setattr(compare, "train", interrupted)
        monkeypatch.setattr(compare, "train_in_own_process", interrupted)
        with pytest.raises(KeyboardInterrupt):
            repeat(first, rates(first), math.inf, lambda _: None)
        assert len(trained) == 3
        monkeypatch.setattr(compare, "train", lambda run: trained.append(Path(run.output_dir)) or train(run))
        again = ready(resume=True)
        assert again.plan == first.plan
        measured = repeat(again, rates(again), math.inf, lambda _: None)
        assert len(trained) == len(set(trained)) == 4
        assert {run for one in measured for run in one.runs} == set(trained)
        for run in trained:
            assert (run / "adapter").is_dir()
            assert not (run / "checkpoints").exists()
            steps = json.loads((run / "metrics.json").read_text())["steps"]
            assert steps == first.plan.steps == 4

    def test_methods_see_the_same_batches_and_test_examples(self, ready):
        measured = repeat(start := ready(), rates(start), math.inf, lambda _: None)
        ours, lora = (load_settings(one.runs[1] / "resolved.yaml") for one in measured)
        alike = {"method", "r", "alpha", "output_dir"}
        assert ours.model_dump(exclude=alike) == lora.model_dump(exclude=alike)
        assert (ours.seed, load_settings(measured[0].runs[0] / "resolved.yaml").seed) == (1, 0)
        texts = [
            [json.loads(line)["text"] for line in (run / "predictions.jsonl").read_text().splitlines()]
            for one in measured
            for run in one.runs
        ]
        assert all(one == texts[0] for one in texts)
        assert sorted(texts[0]) == sorted(load_from_disk(str(start.folder / "data/evaluation"))["text"])

    def test_seeds_end_when_the_time_does(self, ready):
        said = []
        measured = repeat(start := ready(), rates(start), monotonic(), said.append)
        assert [len(one.runs) for one in measured] == [1, 1]
        assert "The time allows 1 of 2 seeds." in said

    def test_a_method_that_fails_is_left_out_and_named(self, ready, monkeypatch):
        def fails(run, *_args, **_kwargs):
            if run.method == "lora":
                raise FloatingPointError("the training loss of step 2 is nan")
            return train(run)

        monkeypatch.setattr(compare, "train_in_own_process", fails)
        said = []
        measured = repeat(start := ready(), rates(start), math.inf, said.append)
        assert [one.candidate.name for one in measured] == ["randlora-r8"]
        assert "LoRA r=2 is left out: the training loss of step 2 is nan" in said

    def test_another_comparison_of_the_folder_is_refused(self, ready, tiny_bert, reviews, tmp_path):
        ready()
        with pytest.raises(ConfigError, match="go on with it by --resume"):
            ready()
        other = settings(tiny_bert, reviews, tmp_path / "out", methods="randlora,lora", batch_size=4)
        with pytest.raises(ConfigError, match="batch_size: 16 there, 4 here"):
            prepare(other, True, print)


class TestForgetting:
    def test_an_encoder_loses_neighbours(self, tmp_path, tiny_bert, reviews):
        values = {"model": tiny_bert, "data": reviews, "max_length": 16, "batch_size": 16, "max_steps": 6}
        common = {**values, "r": 8, "report_to": "none"}
        lost = {}
        for name, rate in (("still", 1e-9), ("far", 3e-2)):
            run = load_settings(None, {**common, "learning_rate": rate, "output_dir": str(tmp_path / name)})
            train(run)
            forgetting = Forgetting(run, reviews)
            lost[name] = forgetting.of(tmp_path / name)
        assert forgetting.unit == "neighbours lost"
        assert 0 <= lost["still"] < 0.02 < lost["far"] <= 1

    def test_a_language_model_gains_loss(self, tmp_path, tiny_llama, reviews):
        (tmp_path / "other.csv").write_text("text\n" + "a bad and dull thing to say\n" * 3)
        run = load_settings(
            None,
            {
                "model": tiny_llama,
                "data": reviews,
                "task": "causal-lm",
                "max_length": 16,
                "max_steps": 2,
                "learning_rate": 1e-9,
                "r": 8,
                "output_dir": str(tmp_path / "run"),
            },
        )
        train(run)
        forgetting = Forgetting(run, str(tmp_path / "other.csv"))
        assert forgetting.of(tmp_path / "run") == pytest.approx(0, abs=1e-3)
        assert (forgetting.unit, len(forgetting)) == ("loss per token gained", 3)

    def test_other_tasks_have_none(self):
        with pytest.raises(ConfigError, match="measured on texts, not for image-classification"):
            Forgetting(load_settings(None, {"model": "m", "data": "d", "task": "image-classification"}), "x.csv")

    def test_too_few_texts_are_refused(self, tmp_path, tiny_bert):
        (tmp_path / "few.csv").write_text("text\none\ntwo\n")
        with pytest.raises(ConfigError, match="has 2 rows; 11 are needed"):
            Forgetting(load_settings(None, {"model": tiny_bert, "data": "d"}), str(tmp_path / "few.csv"))
