"""A real browser for the tests of pages: Debian's chromium and chromium-driver."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.wait import WebDriverWait

DESKTOP, PHONE = 1200, 360  # pixels of width


@contextmanager
def start_browser() -> Iterator[Chrome]:
    """Starts a Chromium that finds no server but this machine's, and keeps a log of its requests and its console."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("headless=new", "no-sandbox", "force-color-profile=srgb", "window-size=1200,900"):
        options.add_argument(f"--{flag}")
    options.add_argument("--enable-unsafe-swiftshader")  # canvases are drawn without a GPU
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("no_proxy", "*")  # the driver is on this machine
        with Chrome(options, ChromeService("/usr/bin/chromedriver")) as driver:
            yield driver


def set_screen(browser: Chrome, width: int, scheme: str = "light") -> None:
    """Has pages look as on a screen of so many pixels."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait(browser: Chrome, condition: Callable[[], object], seconds: float = 20) -> None:
    """Waits until a condition holds."""
    WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda _: condition())
