"""The browser in which the report is tested."""

import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver

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
