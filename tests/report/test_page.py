import json
import re
from html.parser import HTMLParser

import pytest

from cli.helpers import invoke
from randlora.errors import ConfigError
from randlora.report import charts
from randlora.report.page import render, write_report
from report.samples import HOSTILE, hostile, log, run, updates, write_run


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self._script = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._script = tag == "script"

    def handle_data(self, data):
        self.data += data if self._script else ""


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_hostile_strings_are_text_and_data_only():
    page = render(*hostile())
    found = Elements(page)
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert not {"img", "iframe", "object", "form"} & {tag for tag, _ in found.tags}
    assert not [attrs for _, attrs in found.tags if any(name.startswith("on") for name in attrs)]
    assert data_of(page)["runs"] == HOSTILE
    assert set(HOSTILE) < set(data_of(page)["layers"]["names"])


def test_nothing_is_fetched():
    page = render([run("a")], [updates(4)])
    addresses = [attrs.get(name) for _, attrs in Elements(page).tags for name in ("src", "href") if attrs.get(name)]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "default-src 'none'" in page


def test_numbers_that_are_none_are_null_in_the_data():
    losses = data_of(render(*hostile()))["charts"][0]["lines"][1]["y"]
    assert losses == [1, None, None, None, 2]


@pytest.mark.parametrize(("steps", "points", "width"), [(1000, 1000, 1), (1001, 501, 2), (12_345, 950, 13)])
def test_long_curves_are_averaged(steps, points, width):
    entries = log(steps)[:steps]
    line = charts.line(0, entries, "loss")
    assert (len(line["x"]), line["width"]) == (points, width)
    assert line["x"][-1] == steps
    first = sum(entry["loss"] for entry in entries[:width]) / width
    assert line["y"][0] == pytest.approx(first, rel=1e-3)


def test_the_worst_come_first():
    page = render([run("a", examples=40)], [updates(2)])
    shown = re.findall(r'<td class="text" dir="auto">a (\d+)</td>', page)
    assert [int(number) for number in shown] == list(range(39, 19, -1))


def test_settings_that_differ_are_shown():
    page = render([run("a", 0), run("b", 1)], [updates(2), updates(2)])
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>', page.partition('class="settings"')[2])
    assert rows == ["r"]


def test_a_run_with_nothing_has_a_page(tmp_path):
    folder = write_run(tmp_path / "a", history__jsonl="")
    page = write_report([folder], tmp_path / "new/report.html").read_text(encoding="utf-8")
    assert "No run recorded predictions" in page
    assert 'id="updates"' not in page


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/report\.html"):
        write_report([write_run(tmp_path / "a")], tmp_path / "file/report.html")


def test_the_command_writes_the_page_and_names_what_is_no_run(tmp_path):
    folder, output = write_run(tmp_path / "a"), tmp_path / "out.html"
    found = json.loads(invoke("report", str(folder), "--output", str(output), "--json").stdout)
    assert found == {"report": str(output), "bytes": output.stat().st_size}
    assert str(tmp_path / "gone") in invoke("report", str(tmp_path / "gone"), code=2).output.replace("\n", "")
