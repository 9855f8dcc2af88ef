"""A real browser, headless Chromium, that opens pages from disk or from this machine; no other one
can be reached."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

DESKTOP, PHONE = (1280, 900), (390, 844)


class Browser:
    """Chromium with one page open: a file with the network off, or an address of 127.0.0.1."""

    HOME, RIGHT, ENTER, ESCAPE = "\ue011", "\ue014", "\ue007", "\ue00c"  # by the WebDriver standard

    def __init__(
        self, page: Path | str, size: tuple[int, int] = DESKTOP, dark: bool = False
    ) -> None:
        chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
        if not (chromium and chromedriver):
            pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ("--headless=new", "--no-sandbox", "--disable-background-networking"):
            options.add_argument(argument)
        options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(chromedriver)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.command("Network.enable")
        self.open(page, size, dark)

    def open(self, page: Path | str, size: tuple[int, int] = DESKTOP, dark: bool = False) -> None:
        """Open another page, or the same one anew."""
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.command("Emulation.setEmulatedMedia", features=[scheme, still])
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        is_file = isinstance(page, Path)
        self.command("Network.emulateNetworkConditions", offline=is_file, **speed)
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()

    def command(self, name: str, **values: object) -> None:
        self.driver.execute_cdp_cmd(name, values)

    def find(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.find(selector)]

    def choose(self, selector: str, option: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.one(selector)).select_by_visible_text(option)

    def press(self, key: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def until(self, condition: Callable[[], bool]) -> bool:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 20, poll_frequency=0.05).until(lambda _: condition())

    def script(self, code: str) -> object:
        return self.driver.execute_script(code)

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses of all requests since the start, but for data that stands in the page."""
        events = [
            json.loads(row["message"])["message"] for row in self.driver.get_log("performance")
        ]
        sent = [row["params"] for row in events if row["method"] == "Network.requestWillBeSent"]
        urls = [row["request"]["url"] for row in sent]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]
