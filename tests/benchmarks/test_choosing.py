import json
from pathlib import Path

import pytest
from matplotlib import image

from benchmarks import choosing

PAGE = Path(__file__).parents[2] / "docs" / "choosing.md"


@pytest.fixture(scope="module")
def rows():
    return json.loads((choosing.RESULTS / "sweep.json").read_text())["rows"]


def test_the_page_has_the_tables_that_were_measured(rows):
    text = PAGE.read_text()
    for name, table in choosing.tables(rows).items():
        assert table in text, f"{name}: run python -m benchmarks.choosing and put its tables into {PAGE}"


def test_every_row_is_in_a_table(rows):
    told = "\n".join(choosing.tables(rows).values())
    assert all(f"{row['accuracy %']:.1f}% ({row['from %']:.1f}" in told for row in rows)


def test_a_run_that_ended_without_a_result_is_named_and_not_drawn(rows, tmp_path):
    lost = {**rows[5], "accuracy %": None, "from %": None, "to %": None, "neighbours kept %": None}
    rows = [*rows[:5], lost, *rows[6:]]
    assert "| RandLoRA, α/r = 20 | 0.01 | loss no number |  |" in choosing.tables(rows)["learning rate"]
    choosing.draw(tmp_path / "new" / "choosing.png", rows)
    assert image.imread(tmp_path / "new" / "choosing.png").shape[1] == 1600
