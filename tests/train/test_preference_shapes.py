"""Preferences as they are published, read as pairs (DPO, ORPO) or as single answers (KTO)."""

import pytest
from datasets import Dataset

from randlora.errors import ConfigError
from randlora.train.settings import load_settings
from randlora.train.tasks import TASKS

ASKED, GOOD, BAD = (
    {"role": "user", "content": "say"},
    {"role": "assistant", "content": "good"},
    {"role": "assistant", "content": "bad"},
)


def read(task, rows, **values):
    settings = load_settings(None, {"model": "m", "data": "d", "task": task, **values})
    return TASKS[task].read(Dataset.from_list(rows), settings, "d").to_list()


TEXTS = {"prompt": "say", "chosen": "good", "rejected": "bad"}
TURNS = {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize("task", ["dpo", "orpo"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (TEXTS, TEXTS),
        (TURNS, TURNS),
        ({**TURNS, "prompt": "say"}, TURNS),
        ({**TEXTS, "prompt": [ASKED]}, TURNS),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, TURNS),
        ({"prompt": "say", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "score": 3}, TURNS),
        (
            {"chosen": "Human: say it Assistant: good", "rejected": "Human: say it Assistant: goat"},
            {"prompt": "Human: say it Assistant:", "chosen": " good", "rejected": " goat"},
        ),
        (
            {"chosen": "say good", "rejected": "say good day"},
            {"prompt": "say", "chosen": " good", "rejected": " good day"},
        ),
    ],
    ids=["text", "messages", "text-messages", "messages-text", "implicit", "ultrafeedback", "one-text", "beginning"],
)
def test_pairs(task, row, expected):
    (found,) = read(task, [row])
    assert found == expected
    assert read(task, [found]) == [found]  # what was written for other runs is read again


def test_earlier_turns_belong_to_the_prompt():
    talk = [ASKED, BAD, ASKED]
    (found,) = read("dpo", [{"chosen": [*talk, GOOD], "rejected": [*talk, BAD]}])
    assert found == {"prompt": talk, "chosen": [GOOD], "rejected": [BAD]}


class TestSingles:
    @pytest.mark.parametrize(
        ("prompt", "completion"), [("say", "good"), ([ASKED], [GOOD]), ("say", [GOOD]), ([ASKED], "good")]
    )
    def test_labels(self, prompt, completion):
        (found,) = read("kto", [{"prompt": prompt, "completion": completion, "label": True}])
        plain = isinstance(prompt, str) and isinstance(completion, str)
        said = ("say", "good") if plain else ([ASKED], [GOOD])
        assert found == {"prompt": said[0], "completion": said[1], "label": True}

    def test_numbers_in_another_column(self):
        rows = [{"prompt": "say", "completion": word, "thumb": thumb} for word, thumb in (("good", 1), ("bad", 0))]
        assert [row["label"] for row in read("kto", rows, label_column="thumb")] == [True, False]

    def test_pairs_come_apart(self):
        rows = [TEXTS, {**TEXTS, "prompt": "say it"}]
        found = [(row["prompt"], row["completion"], row["label"]) for row in read("kto", rows)]
        assert found == [
            ("say", "good", True),
            ("say it", "good", True),
            ("say", "bad", False),
            ("say it", "bad", False),
        ]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("dpo", {"text": "a", "label": 1}, "'d' has the columns text, label; wanted are prompt, chosen and rejected"),
        ("kto", {"prompt": "a", "label": 1}, "'d' has the columns prompt, label; wanted are prompt, completion, label"),
        ("dpo", {**TEXTS, "chosen": 3}, "column 'chosen' of 'd' holds .*; wanted is text, or messages"),
        ("dpo", {**TEXTS, "chosen": [GOOD]}, "text in one of the columns chosen and rejected, messages in the other"),
        ("dpo", {"chosen": "good", "rejected": "bad"}, "row 0 of 'd' do not begin alike"),
        ("dpo", {"chosen": [ASKED], "rejected": [ASKED, BAD]}, "row 0 of 'd' has a prompt, but an empty answer"),
        ("dpo", {**TEXTS, "rejected": ""}, "row 0 of 'd' has a prompt, but an empty answer"),
        ("kto", {"prompt": "a", "completion": "b", "label": 2}, r"column 'label' of 'd' holds \[2\]: wanted are true"),
        ("kto", {"prompt": "a", "completion": "b", "label": "yes"}, "column 'label' of 'd' holds no labels"),
    ],
)
def test_what_cannot_be_read_is_named(task, row, message):
    with pytest.raises(ConfigError, match=message):
        read(task, [row])


def test_gaps_are_named():
    with pytest.raises(ConfigError, match="'d' has no 'prompt' in 1 rows, first in row 1"):
        read("dpo", [TEXTS, {**TEXTS, "prompt": None}])


def test_pairs_have_no_labels_to_be_named():
    with pytest.raises(ConfigError, match="label_column='thumb': 'd' has pairs of chosen and rejected; leave it out"):
        read("kto", [{**TEXTS, "thumb": True}], label_column="thumb")


@pytest.mark.parametrize(("task", "name"), [("dpo", "input_column"), ("kto", "input_column"), ("orpo", "label_column")])
def test_columns_cannot_be_named_otherwise(task, name):
    with pytest.raises(ConfigError, match=r"reads columns by their own names.*rename \['other'\]"):
        read(task, [TEXTS], **{name: "other"})
