"""Numbers for texts: metrics against SciPy's and scikit-learn's, what is refused, and a run that is used."""

import csv
import json

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_diabetes
from sklearn.metrics import r2_score, root_mean_squared_error
from transformers import AutoModelForSequenceClassification

from cli.helpers import answer, invoke
from randlora.errors import ConfigError
from randlora.train.bootstrap import bootstrap_intervals
from randlora.train.data import load_data, with_task_of_labels
from randlora.train.settings import load_settings
from randlora.train.tasks import TASKS
from randlora.train.tasks.regression import _metrics, _ranks

TASK = TASKS["regression"]


def settings(data, **values):
    return load_settings(None, {"model": "m", "data": str(data), **values})


def table(path, rows, names=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path


def drawn(examples=80, seed=0):
    draw = np.random.default_rng(seed)
    wanted = draw.integers(0, 12, examples) / 4  # many are equal
    return wanted + draw.normal(0, 0.7, examples), wanted


class TestMetrics:
    def test_they_are_those_of_scipy_and_scikit_learn(self):
        guessed, wanted = drawn()
        guessed[:5] = guessed[5]
        found = TASK.outcome(guessed[:, None].astype(np.float32), wanted, ["label"])
        expected = {
            "rmse": root_mean_squared_error(wanted, guessed),
            "r2": r2_score(wanted, guessed),
            "pearson": stats.pearsonr(wanted, guessed).statistic,
            "spearman": stats.spearmanr(wanted, guessed).statistic,
            "loss": np.mean((wanted - guessed) ** 2),
        }
        assert found.metrics == pytest.approx(expected, rel=1e-5)
        assert found.baseline.metrics == pytest.approx({"r2": 0.0, "rmse": np.std(wanted)})
        assert root_mean_squared_error(wanted, np.full(80, wanted.mean())) == pytest.approx(np.std(wanted))
        assert found.shortfall == ""

    def test_drawn_again_they_are_those_of_the_examples_that_were_drawn(self):
        guessed, wanted = drawn(30)
        counts = np.random.default_rng(1).multinomial(30, np.full(30, 1 / 30), size=4)
        found = _metrics(guessed, wanted, counts)
        for draw, count in enumerate(counts):
            one, other = np.repeat(guessed, count), np.repeat(wanted, count)
            assert found["spearman"][draw] == pytest.approx(stats.spearmanr(one, other).statistic)
            assert found["pearson"][draw] == pytest.approx(stats.pearsonr(one, other).statistic)
            assert found["r2"][draw] == pytest.approx(r2_score(other, one))
            assert found["rmse"][draw] == pytest.approx(root_mean_squared_error(other, one))
            ranks = np.repeat(_ranks(guessed, counts)[draw], count)
            assert np.array_equal(ranks, stats.rankdata(one))

    def test_intervals_are_those_of_scipy_s_bootstrap(self):
        guessed, wanted = drawn(150)
        found = TASK.intervals(guessed[:, None], wanted)
        peer = stats.bootstrap(
            (wanted, guessed),
            lambda a, b: stats.pearsonr(a, b).statistic,
            paired=True,
            vectorized=False,
            method="percentile",
            n_resamples=2000,
            rng=3,
        ).confidence_interval
        assert found["pearson"] == pytest.approx((peer.low, peer.high), abs=0.01)
        assert found == TASK.intervals(guessed[:, None], wanted)
        assert bootstrap_intervals(lambda counts: {"a": counts[:, 0]}, 1) == {}

    @pytest.mark.parametrize("constant", ["guessed", "wanted"])
    def test_what_does_not_vary_correlates_with_nothing(self, constant):
        values = {"guessed": np.arange(4.0), "wanted": np.arange(4.0), constant: np.ones(4)}
        found = TASK.outcome(values["guessed"][:, None], values["wanted"], ["label"]).metrics
        assert (found["pearson"], found["spearman"]) == (0, 0)
        assert found["r2"] == pytest.approx(r2_score(values["wanted"], values["guessed"]))

    def test_no_better_than_the_mean(self):
        wanted = np.array([100.0, 200.0, 300.0])
        text = TASK.outcome(np.zeros((3, 1)), wanted, ["label"]).shortfall
        assert "is no better than always saying the mean, 200" in text
        assert "scaled to about -1 to 1" in text


class TestData:
    def test_numbers_with_a_fraction_make_it_a_regression_and_that_is_said(self, tmp_path):
        path = table(tmp_path / "d.csv", [(f"text {n}", n / 4) for n in range(20)])
        with pytest.warns(UserWarning, match="the labels in 'label' make this a task='regression'"):
            found = with_task_of_labels(settings(path))
        assert found.task == "regression"
        assert load_data(found).labels == ["label"]
        whole = settings(table(tmp_path / "e.csv", [(f"text {n}", float(n % 3)) for n in range(20)]))
        assert with_task_of_labels(whole) is whole
        with pytest.raises(ConfigError, match="take task='regression'"):
            load_data(settings(path))
        with pytest.raises(ConfigError, match="class_weights='balanced' is for one label or several"):
            with_task_of_labels(settings(path, class_weights="balanced"))

    @pytest.mark.parametrize(
        ("labels", "expected"),
        [
            (["1", "2", "many", "4"], "row 2 of .* has the label 'many': regression needs a number in every row"),
            ([1.0, float("inf"), 2.5, 3.0], "row 1 of .* has the label inf"),
            ([1.0, float("nan"), 2.5, 3.0], "in 1 of its rows, first in row 1|row 1 of .* has the label nan"),
            ([1.0, None, 2.5, 3.0], "has no 'label' in 1 of its rows, first in row 1"),
        ],
    )
    def test_labels_that_are_no_numbers(self, tmp_path, labels, expected):
        path = table(tmp_path / "d.csv", [(f"text {n}", label) for n, label in enumerate(labels)])
        with pytest.raises(ConfigError, match=expected):
            load_data(settings(path, task="regression"))


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Scikit-learn's diabetes data as sentences; the label is how far the disease went, in standard deviations."""
    data = load_diabetes(scaled=False)
    spread = (data.target - data.target.mean()) / data.target.std()
    rows = [
        (f"age {x[0]:.0f}, body mass index {x[2]:.0f}, blood pressure {x[3]:.0f}, sugar {x[9]:.0f}", round(float(y), 3))
        for x, y in zip(data.data[:120], spread[:120], strict=True)
    ]
    return table(tmp_path_factory.mktemp("patients") / "patients.csv", rows, ("patient", "progress"))


def test_a_run_is_scored_used_merged_and_shown(tiny_bert, patients, tmp_path):
    columns = ["--input-column", "patient", "--label-column", "progress"]
    flags = ["--model", tiny_bert, "--data", patients, *columns, "--r", 8, "--max-steps", 6, "--batch-size", 8]
    flags += ["--max-length", 32, "--report-to", "none", "--eval-steps", 3, "--best", "rmse"]
    result = invoke("train", *flags, "--output-dir", tmp_path / "run")
    assert "make this a task='regression'" in result.stderr
    assert "task: regression" in (tmp_path / "run/resolved.yaml").read_text()
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    wanted, guessed = ([row[name] for row in rows] for name in ("label", "predicted"))
    assert metrics["eval_r2"] == pytest.approx(r2_score(wanted, guessed), abs=1e-5)

    done = answer("train", *flags, "--output-dir", tmp_path / "run", "--resume", "auto")
    assert (done["steps"], done["metrics"]["eval_r2"]) == (6, pytest.approx(metrics["eval_r2"], abs=1e-5))

    found = answer("eval", tmp_path / "run")["adapter"]
    assert found["rmse"] == pytest.approx(metrics["eval_rmse"], abs=1e-5)
    low, high = found["intervals"]["pearson"]
    assert low <= found["pearson"] <= high
    text = invoke("eval", tmp_path / "run").stdout
    assert "always saying the mean" in text
    assert "pearson" in text

    (one,) = answer("predict", tmp_path / "run", rows[0]["text"])["predictions"]
    assert one == {"text": rows[0]["text"], "value": pytest.approx(rows[0]["predicted"], abs=1e-4)}
    invoke("predict", tmp_path / "run", "--data", patients, "--output", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        assert list(next(csv.DictReader(file))) == ["patient", "progress", "predicted"]

    invoke("merge", tmp_path / "run", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    again = answer("eval", tmp_path / "merged", "--data", patients, *columns)["adapter"]
    assert again["task"] == "regression"
    assert again["rmse"] == pytest.approx(
        answer("eval", tmp_path / "run", "--data", patients)["adapter"]["rmse"], abs=1e-4
    )
    last = max((tmp_path / "run/checkpoints").glob("checkpoint-*"), key=lambda one: int(one.name.split("-")[-1]))
    assert answer("eval", last)["adapter"]["task"] == "regression"
    invoke("convert", tmp_path / "run", tmp_path / "lora", "--to", "lora", "--rank", 2)
    (near,) = answer("predict", tmp_path / "lora", "age 50")["predictions"]
    assert set(near) == {"text", "value"}

    page = tmp_path / "report.html"
    invoke("report", tmp_path / "run", "--output", page)
    data = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
    (chart,) = (one for one in data["charts"] if one["id"] == "predicted")
    assert chart["lines"][0]["x"] == pytest.approx(wanted, rel=1e-3)
    assert chart["lines"][0]["y"] == pytest.approx(guessed, rel=1e-3)
    assert ">R²</button>" in page.read_text()
    assert ">accuracy (95%)</button>" not in page.read_text()
    assert 'problem_type="regression"' in answer("push", tmp_path / "run", "me/x", "--dry-run")["card"]
