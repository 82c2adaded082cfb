"""Pages in a real Chromium, without a window."""

from pathlib import Path

from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait


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
