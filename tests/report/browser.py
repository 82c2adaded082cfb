"""Pages in a real Chromium, without a window."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

MISSING = (
    "the tests of the report need Chromium and its driver: `make browser` installs them (Debian: apt-get install "
    "chromium chromium-driver); `-m 'not browser'` leaves these tests out"
)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-device-scale-factor=1")


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail(MISSING)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


class Page:
    """An opened report."""

    def __init__(self, chrome: webdriver.Chrome, file: Path, width: int = 1280, theme: str = "light") -> None:
        self.chrome = chrome
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        chrome.get_log("browser")
        chrome.get(file.as_uri())
        self.wait("return document.documentElement.dataset.ready !== undefined")

    def cdp(self, command: str, **values: object) -> dict:
        return self.chrome.execute_cdp_cmd(command, values)

    def js(self, script: str, *arguments: object) -> object:
        return self.chrome.execute_script(script, *arguments)

    def wait(self, condition: str, *arguments: object) -> None:
        WebDriverWait(self.chrome, 60, poll_frequency=0.05).until(lambda _: self.js(condition, *arguments))

    def draw(self, chart: str) -> None:
        """Scrolls to a plot, as a reader does, and waits until it is drawn."""
        self.js(f"document.querySelector('[data-chart={chart}]').scrollIntoView({{block: 'center'}})")
        self.wait(f"return document.querySelector('[data-chart={chart}] .main-svg') !== null")

    def charts(self) -> list[str]:
        return self.js("return [...document.querySelectorAll('.plot')].map((plot) => plot.dataset.chart)")

    def traces(self, chart: str) -> list[str]:
        """Names of the runs that a plot shows."""
        return self.js(f"return document.querySelector('[data-chart={chart}]').data.map((trace) => trace.name)")

    def console(self) -> list[dict]:
        return self.chrome.get_log("browser")
