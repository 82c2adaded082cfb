import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from randlora.errors import ConfigError
from randlora.train.data import load_data
from randlora.train.settings import load_settings


def settings(data, **values):
    return load_settings(None, {"model": "m", "data": str(data), **values})


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).to_csv(path)
    return path


ROWS = [{"text": f"text {n}", "label": ["bad", "good"][n % 2], "other": n} for n in range(40)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_files_of_every_kind_hold_the_same(tmp_path, kind):
    data = load_data(settings(write(tmp_path / f"d.{kind}", ROWS)))
    assert data.labels == ["bad", "good"]
    assert data.train.column_names == ["text", "label"]
    assert sorted([*data.train["text"], *data.evaluation["text"]]) == sorted(row["text"] for row in ROWS)
    truth = {row["text"]: ["bad", "good"].index(row["label"]) for row in ROWS}
    assert all(truth[row["text"]] == row["label"] for part in data[:2] for row in part)


def test_a_saved_dataset_keeps_splits_and_label_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    parts = {
        name: Dataset.from_dict({"text": [f"{name} {n}" for n in range(4)], "label": [0, 1, 1, 1]}, features=features)
        for name in ("train", "validation")
    }
    DatasetDict(parts).save_to_disk(tmp_path / "d")
    data = load_data(settings(tmp_path / "d"))
    assert data.labels == ["no", "yes"]
    assert list(data.evaluation["text"]) == [f"validation {n}" for n in range(4)]
    assert list(data.train["label"]) == [0, 1, 1, 1]


def test_the_split_is_seeded_and_leaks_no_text(tmp_path):
    path = write(tmp_path / "d.csv", [*ROWS, *ROWS])  # each text twice
    first, again, other = (load_data(settings(path, seed=seed, eval_fraction=0.25)) for seed in (1, 1, 2))
    assert list(first.evaluation["text"]) == list(again.evaluation["text"]) != list(other.evaluation["text"])
    assert len(first.evaluation) == 20
    assert not set(first.train["text"]) & set(first.evaluation["text"])


def test_columns_of_other_names(tmp_path):
    path = write(tmp_path / "d.csv", [{"sentence": row["text"], "stars": row["label"]} for row in ROWS])
    data = load_data(settings(path, input_column="sentence", label_column="stars"))
    assert data.train.column_names == ["text", "label"]


def test_causal_language_modelling_needs_no_label(tmp_path):
    data = load_data(settings(write(tmp_path / "d.csv", [{"text": row["text"]} for row in ROWS]), task="causal-lm"))
    assert data.labels == []
    assert data.train.column_names == ["text"]


@pytest.mark.parametrize(
    ("rows", "values", "expected"),
    [
        (ROWS, {"input_column": "body"}, "has no column 'body'.*input_column"),
        (ROWS, {"label_column": "class"}, "has no column 'class'.*label_column"),
        ([*ROWS, {"text": None, "label": "bad", "other": 0}], {}, "no 'text' in 1 of its rows, first in row 40"),
        ([{"text": f"{n}", "label": "same"} for n in range(9)], {}, "single label 'same'"),
        (ROWS[:2], {"eval_fraction": 0.1}, "leaves nothing on one side"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, rows, values, expected):
    with pytest.raises(ConfigError, match=expected):
        load_data(settings(write(tmp_path / "d.jsonl", rows), **values))


def test_unknown_labels_in_the_evaluation_data(tmp_path):
    train = write(tmp_path / "t.csv", ROWS)
    evaluation = write(tmp_path / "e.csv", [{"text": "x", "label": "ugly"}, {"text": "y", "label": "good"}])
    with pytest.raises(ConfigError, match="'ugly'"):
        load_data(settings(train, eval_data=str(evaluation)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.csv", None, "no data file"),
        ("d.txt", "x", "must end in one of"),
        ("d.json", "{", "cannot read"),
        ("header.csv", "text,label\n", "it holds no rows"),
        ("latin.csv", "text,label\ncaf\xe9,1\n", "it is not in UTF-8"),
        ("folder", "", "not one that datasets' save_to_disk wrote"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, name, content, expected):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=expected):
        load_data(settings(path))


def test_a_name_that_is_nowhere():
    with pytest.raises(ConfigError, match="no local file or folder, and no dataset of the hub"):
        load_data(settings("no-such-owner/no-such-dataset"))
