import base64

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from randlora.report.page import render
from report.browser import Page
from report.samples import hostile, run, updates

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "small.html"
    file.write_text(render([run("ours"), run("lora", 1)], [updates(8), updates(8, low_rank=4)]), encoding="utf-8")
    return file


def element(page, selector):
    """In the middle of the window, clear of what stays at its top."""
    found = page.chrome.find_element(By.CSS_SELECTOR, selector)
    page.js("arguments[0].scrollIntoView({block: 'center'})", found)
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_plot_is_drawn_within_the_page_and_nothing_is_reported(chromium, small, width, theme):
    page = Page(chromium, small, width, theme)
    wanted = ["loss", "learning_rate", "grad_norm", "seconds", "memory_bytes", "eval_accuracy", "eval_loss"]
    assert page.charts() == [*wanted, "spectrum", "rank", "norm", "lam", "gamma"]
    for chart in page.charts():
        page.draw(chart)
        marks = "svg .scatterlayer path, svg .heatmaplayer image"
        page.wait(f"return document.querySelector('[data-chart={chart}]').querySelector('{marks}') !== null")
    assert page.js("return document.documentElement.scrollWidth <= innerWidth")
    ground = page.js("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 20, 24)"}[theme]
    assert page.console() == []


def test_a_short_name_stays_on_its_line_on_a_phone(chromium, small):
    page = Page(chromium, small, 390)
    heights = "return [...document.querySelectorAll('#runs tbody th')].map((one) => one.clientHeight)"
    lines = "return parseFloat(getComputedStyle(document.querySelector('#runs tbody th')).lineHeight)"
    assert all(height < 2 * page.js(lines) for height in page.js(heights))


def test_an_axis_does_not_reach_below_what_there_can_be(chromium, small):
    page = Page(chromium, small)
    page.draw("seconds")  # all the same, around which Plotly would put a range of its own
    low = page.js("return document.querySelector('[data-chart=seconds]')._fullLayout.yaxis.range[0]")
    assert low >= 0


def test_the_page_asks_for_nothing_but_itself(chromium, small):
    page = Page(chromium, small)
    assert page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    answer = "const [url, done] = arguments; fetch(url).then(() => done('sent'), () => done('refused'))"
    assert page.chrome.execute_async_script(answer, "https://example.org") == "refused"


def test_a_tooltip_appears_under_the_mouse(chromium, small):
    page = Page(chromium, small)
    page.draw("seconds")
    plot = element(page, "[data-chart=seconds] .nsewdrag")
    to_point = """const { xaxis: x, yaxis: y } = document.querySelector('[data-chart=seconds]')._fullLayout;
        return [Math.round(x.d2p(25) - x._length / 2), Math.round(y.d2p(0.3) - y._length / 2)]"""
    ActionChains(chromium).move_to_element_with_offset(plot, *page.js(to_point)).perform()
    page.wait("return document.querySelector('[data-chart=seconds] .hovertext') !== null")
    assert ": 0.3" in page.js("return document.querySelector('[data-chart=seconds] .hovertext').textContent")


def test_points_are_read_with_the_keyboard(chromium, small):
    page = Page(chromium, small)
    page.draw("rank")
    plot = element(page, "[data-chart=rank]")
    plot.send_keys(Keys.ARROW_RIGHT)
    plot.send_keys(Keys.ARROW_RIGHT)
    page.wait("return document.querySelector('[data-chart=rank] .hovertext') !== null")
    first = element(page, "#read-out").get_attribute("textContent")
    plot.send_keys(Keys.ARROW_DOWN)
    second = element(page, "#read-out").get_attribute("textContent")
    assert first.startswith("ours, ")
    assert second == first.replace("ours", "lora")
    page.draw("lam")
    element(page, "[data-chart=lam]").send_keys(Keys.ARROW_DOWN)
    assert "basis 1" in element(page, "#read-out").get_attribute("textContent")


def test_a_run_is_switched_off_and_on_everywhere_with_the_keyboard(chromium, small):
    page = Page(chromium, small)
    for chart in ("rank", "loss"):
        page.draw(chart)
    box = element(page, "input[data-run='0']")
    box.send_keys(Keys.SPACE)
    assert set(page.traces("loss")) == {"lora"}
    page.draw("rank")
    page.wait("return document.querySelector('[data-chart=rank]').data.length === 1")
    element(page, "[data-all='1']").click()
    page.draw("loss")
    page.wait("return new Set(document.querySelector('[data-chart=loss]').data.map((one) => one.name)).size === 2")


def test_another_layer_and_scale_can_be_chosen(chromium, small):
    page = Page(chromium, small)
    page.draw("spectrum")
    largest = "return document.querySelector('[data-chart=spectrum]').data[0].y[0]"
    before = page.js(largest)
    Select(element(page, "#layer")).select_by_index(5)
    assert page.js(largest) != before
    element(page, "#relative").click()
    assert page.js(largest) == 1
    assert "zero after 4" in element(page, "[data-chart=spectrum]").text


def test_rows_are_sorted(chromium, small):
    page = Page(chromium, small)
    head = element(page, ".sortable th button")
    names = "return [...document.querySelectorAll('.sortable tbody th')].map((cell) => cell.textContent)"
    head.send_keys(Keys.ENTER)
    assert page.js(names) == ["lora", "ours"]
    head.send_keys(Keys.ENTER)
    assert page.js(names) == ["ours", "lora"]


def test_the_theme_is_chosen_by_a_button(chromium, small):
    page = Page(chromium, small, theme="dark")
    button = element(page, "#theme")
    for wanted in ("light", "dark"):
        button.click()
        assert page.js("return document.documentElement.dataset.theme") == wanted
    button.click()


def test_everything_is_on_paper(chromium, small):
    page = Page(chromium, small, theme="dark")
    pdf = base64.b64decode(page.cdp("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF")
    drawn = page.js("return [...document.querySelectorAll('.plot')].every((plot) => plot.dataset.drawn)")
    assert drawn
    assert page.js("return document.documentElement.dataset.theme") == "dark"
    assert page.console() == []


def test_hostile_texts_stay_texts(chromium, tmp_path):
    file = tmp_path / "hostile.html"
    runs, found = hostile()
    file.write_text(render(runs, found), encoding="utf-8")
    page = Page(chromium, file, 390)
    for chart in page.charts():
        page.draw(chart)
    page.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.js("return window.hacked === undefined")
    assert page.js("return document.querySelectorAll('img, main a, .plot a').length") == 0
    assert page.js("return document.querySelector('.sortable tbody th').textContent") == runs[0].name
    assert page.js("return document.querySelector('#layer').options.length") == 8
    assert page.js("return document.documentElement.scrollWidth <= innerWidth")
    assert page.console() == []


def test_twenty_runs_of_two_hundred_layers_stay_usable(chromium, tmp_path):
    file = tmp_path / "many.html"
    many = [run(f"run {number}", number, steps=2000) for number in range(20)]
    file.write_text(render(many, [updates(200, 32) for _ in many]), encoding="utf-8")
    assert file.stat().st_size < 12e6
    page = Page(chromium, file)
    # no time decides: what the page draws at once is bounded, whatever there is
    assert page.js("return document.querySelectorAll('.plot[data-drawn]').length") <= 6
    print(f"ready after {page.js('return document.documentElement.dataset.ready')} ms")
    for chart in page.charts():
        page.draw(chart)
    assert page.js("return document.querySelectorAll('*').length") < 20_000
    assert len(page.traces("rank")) == 20
    points = "return Math.max(...document.querySelector('[data-chart=loss]').data.map((one) => one.x.length))"
    page.draw("loss")
    assert page.js(points) <= 1000
    element(page, "[data-all='']").click()
    page.draw("loss")
    page.wait("return document.querySelector('[data-chart=loss]').data.length === 0")
    Page(chromium, file, 390).draw("gamma")
    assert page.js("return document.documentElement.scrollWidth <= innerWidth")
    assert page.console() == []
