import bz2
import gzip
import json
import lzma

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
        ("d.doc", "x", "must end in one of"),
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


@pytest.mark.parametrize("column", ["label", "nowhere"])
def test_plain_text_has_no_labels_to_be_named(tmp_path, column):
    data = write(tmp_path / "d.csv", ROWS)
    with pytest.raises(
        ConfigError, match=f"label_column='{column}': causal-lm .* reads no labels: leave it out, or .*chat"
    ):
        load_data(settings(data, task="causal-lm", label_column=column))


class TestColumnsOfChat:
    ROWS = ({"ask": "one?", "more": None, "reply": "1"}, {"ask": "two?", "more": "Say it.", "reply": "2"})

    def read(self, tmp_path, **values):
        rows = [{**row, "ask": f"{n}: {row['ask']}"} for n in range(5) for row in self.ROWS]
        data = load_data(settings(write(tmp_path / "d.jsonl", rows), task="chat", **values))
        return sorted([*data.train.to_list(), *data.evaluation.to_list()], key=str)

    def test_prompts_and_completions(self, tmp_path):
        found = self.read(tmp_path, input_column="ask", label_column="reply")
        assert found[:2] == [{"prompt": "0: one?", "completion": "1"}, {"prompt": "0: two?", "completion": "2"}]

    def test_alpaca_s_fields(self, tmp_path):
        found = self.read(tmp_path, input_column=["ask", "more"], label_column="reply")
        asked = [row["messages"][0]["content"] for row in found]
        assert asked[:2] == ["0: one?", "0: two?\n\nSay it."]
        assert [row["messages"][1]["content"] for row in found][:2] == ["1", "2"]

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"input_column": ["ask", "more"]}, "name its output by label_column"),
            ({"input_column": "ask", "label_column": "answer"}, "has no column 'answer'.*label_column"),
            ({"input_column": "question", "label_column": "reply"}, "has no column 'question'.*input_column"),
        ],
    )
    def test_columns_that_are_not_there(self, tmp_path, values, expected):
        with pytest.raises(ConfigError, match=expected):
            self.read(tmp_path, **values)


class TestMoreKinds:
    @pytest.mark.parametrize("name", ["d.tsv", "d.csv.gz", "d.tsv.bz2", "d.jsonl.gz", "d.csv.xz"])
    def test_a_file_is_read_by_its_ending(self, tmp_path, name):
        kind, _, packed = name[2:].partition(".")
        separator = {"csv": ",", "tsv": "\t"}.get(kind)
        lines = [f"{row['text']}{separator}{row['label']}" for row in ROWS]
        text = "\n".join(json.dumps(row) for row in ROWS)
        if separator:
            text = "\n".join([f"text{separator}label", *lines])
        opener = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "": open}[packed]
        with opener(tmp_path / name, "wt") as file:
            file.write(text)
        data = load_data(settings(tmp_path / name))
        assert len(data.train) + len(data.evaluation) == len(ROWS)
        assert data.labels == ["bad", "good"]

    def test_lines_of_text(self, tmp_path):
        (tmp_path / "d.txt").write_text("".join(f"line {n}\n" for n in range(20)))
        data = load_data(settings(tmp_path / "d.txt", task="causal-lm"))
        assert {*data.train["text"], *data.evaluation["text"]} == {f"line {n}" for n in range(20)}

    @pytest.mark.parametrize("ending", ["csv", "tsv"])
    def test_another_encoding(self, tmp_path, ending):
        between = {"csv": ",", "tsv": "\t"}[ending]
        rows = "\n".join(f"café {n}{between}{n % 2}" for n in range(20))
        (tmp_path / f"d.{ending}").write_text(f"text{between}label\n{rows}\n", encoding="cp1252")
        data = load_data(settings(tmp_path / f"d.{ending}", encoding="cp1252"))
        assert all(text.startswith("café ") for text in data.train["text"])
        with pytest.raises(ConfigError, match="encoding, such as cp1252"):
            load_data(settings(tmp_path / f"d.{ending}"))

    def test_several_files_are_joined(self, tmp_path):
        paths = [str(write(tmp_path / name, rows)) for name, rows in (("a.csv", ROWS[:20]), ("b.jsonl", ROWS[20:]))]
        data = load_data(load_settings(None, {"model": "m", "data": paths}))
        assert sorted([*data.train["text"], *data.evaluation["text"]]) == sorted(row["text"] for row in ROWS)
        assert load_settings(None, {"model": "m", "data": paths[:1]}).data == paths[0]

    def test_splits_by_name(self, tmp_path):
        parts = {name: Dataset.from_list([{**row, "text": f"{name} {row['text']}"} for row in ROWS]) for name in "abc"}
        DatasetDict(parts).save_to_disk(tmp_path / "d")
        data = load_data(settings(tmp_path / "d", split="b", eval_split="c"))
        assert {text[0] for text in data.train["text"]} == {"b"}
        assert {text[0] for text in data.evaluation["text"]} == {"c"}
        with pytest.raises(ConfigError, match=r"no split 'train', only \['a', 'b', 'c'\]: name one by split"):
            load_data(settings(tmp_path / "d"))
        with pytest.raises(ConfigError, match="no split 'd' to evaluate on"):
            load_data(settings(tmp_path / "d", split="a", eval_split="d"))

    def test_a_limit_draws_by_the_seed(self, tmp_path):
        path = write(tmp_path / "d.csv", ROWS)
        first, again, other = (load_data(settings(path, max_samples=9, max_eval_samples=2, seed=s)) for s in (0, 0, 1))
        assert (len(first.train), len(first.evaluation)) == (9, 2)
        assert list(first.train["text"]) == list(again.train["text"]) != list(other.train["text"])
