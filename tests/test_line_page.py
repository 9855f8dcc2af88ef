"""The page of `serve` in a real browser; each test has a category of its own."""

import base64
import json
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from builders.browser import DESKTOP, PHONE, Browser
from builders.detectors import pictures
from builders.projects import read_rows
from builders.servers import Server, as_png, of_category

from anomaly_detection import Detector

MARKUP = "<img src=x onerror=alert(1)>.png"
GIVE = """
const transfer = new DataTransfer();
for (const [name, content] of arguments[0]) {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt());
  transfer.items.add(new File([bytes], name));
}
const options = { bubbles: true, cancelable: true };
document.body.dispatchEvent(arguments[1] === "drop"
  ? new DragEvent("drop", { dataTransfer: transfer, ...options })
  : new ClipboardEvent("paste", { clipboardData: transfer, ...options }));
"""
HIDE = """
Object.defineProperty(document, "hidden", { value: arguments[0], configurable: true });
document.dispatchEvent(new Event("visibilitychange"));
"""
COLOURS = """
const { color, backgroundColor } = getComputedStyle(document.querySelector(arguments[0]));
return [color, backgroundColor, getComputedStyle(document.body).backgroundColor];
"""


class Page(Browser):
    """The page of a server, which must be quiet and ask nobody else."""

    @contextmanager
    def visit(
        self,
        server: Server,
        category: str = "",
        refused: bool = False,
        size: tuple[int, int] = DESKTOP,
        dark: bool = False,
    ) -> Iterator[None]:
        """Look at a category.

        Args:
            server: The one whose page it is.
            category: The first one by default.
            refused: The server may refuse something, which Chromium writes to its console.
            size: Of the screen.
            dark: Whether dark colours are preferred.
        """
        self.open("about:blank")
        for log in (self.console, self.requests):
            log()  # what is of others
        self.open(f"{server.url}/#{quote(category)}", size, dark)
        yield
        said = self.console()
        assert said == [x for x in said if refused and "Failed to load" in x]
        asked = self.requests()
        assert asked == [x for x in asked if x.startswith(f"{server.url}/")]

    def give(self, *files: tuple[str, bytes], way: str = "drop") -> None:
        coded = [(name, base64.b64encode(content).decode()) for name, content in files]
        self.driver.execute_script(GIVE, coded, way)

    def awaits(self, selector: str, text: str) -> bool:
        return self.until(lambda: text in self.one(selector).text)

    def names(self) -> list[str]:
        cells = "[...document.querySelectorAll('tbody:not([hidden]) .name')]"
        return self.script(f"return {cells}.map((cell) => cell.textContent)")

    def first(self, text: str):
        """The button or field of the newest verdict with a label that starts so."""
        self.until(lambda: self.names())
        return self.find(f'tbody:not([hidden]) [aria-label^="{text}"]')[0]

    def shows_images(self, selector: str) -> bool:
        """Wait until an image and its overlay are loaded."""
        images = f"[...document.querySelectorAll('{selector} img')]"
        count = f"return {images}.filter((img) => img.naturalWidth > 0).length"
        return self.until(lambda: self.script(count) == 2)

    def contrast(self, selector: str) -> float:
        """Of a text against its background, by WCAG 2."""
        text, own, body = self.driver.execute_script(COLOURS, selector)
        behind = body if own == "rgba(0, 0, 0, 0)" else own
        low, high = sorted(luminance(x) for x in (text, behind))
        return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    values = np.array([int(x) for x in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with Page("about:blank") as page:
        yield page


@pytest.fixture(scope="module")
def judged(export) -> dict:
    """An image's file for each verdict, and what the detector says of it."""
    detector = Detector.load(export)
    files = [as_png(x) for x in pictures(40, seed=3)]
    return {found.verdict: (x, found) for x in files for found in [detector.predict(x)]}


@pytest.fixture(scope="module")
def normal(judged) -> bytes:
    return judged["normal"][0]


@pytest.fixture(scope="module")
def served(export, tmp_path_factory) -> Iterator[tuple[Server, Iterator[str]]]:
    """A server with a store, and its categories."""
    folder, names = tmp_path_factory.mktemp("served"), [f"part {i}" for i in range(16)]
    detectors = [of_category(export, folder / name, name) for name in names]
    with Server(folder, *detectors, "--store", folder / "store", "--limit", 300) as server:
        server.store = folder / "store"
        yield server, iter(names)


@pytest.fixture
def server(served) -> Server:
    return served[0]


@pytest.fixture
def category(served) -> str:
    """One without verdicts."""
    return next(served[1])


def test_an_image_gets_the_verdict_of_the_detector(page, server, category, judged, tmp_path):
    with page.visit(server, category):
        for way in ("drop", "paste", "choose"):
            for verdict, (content, found) in judged.items():
                name = f"{verdict} {way}.png"
                if way == "choose":
                    (tmp_path / name).write_bytes(content)
                    page.one("#files").send_keys(str(tmp_path / name))
                else:
                    page.give((name, content), way=way)
                assert page.awaits("#judged", name)
                assert page.one("#verdict").text.split()[1:] == [verdict]
                score, threshold = page.texts("#scale text")
                assert float(score.split()[1]) == pytest.approx(found.score, rel=1e-3)
                assert float(threshold.split()[1]) == pytest.approx(found.threshold, rel=1e-3)
                said = re.fullmatch(r"Of 100 good parts, about (\d+) .*", page.one("#chance").text)
                assert int(said[1]) == round(100 * found.p_value)
                assert page.shows_images("#pictures")


def test_several_images_are_judged_in_turn_and_what_is_none_is_told(page, server, category, judged):
    files = [("1.png", judged["normal"][0]), (MARKUP, b"text"), ("3.png", judged["anomalous"][0])]
    with page.visit(server, category, refused=True):
        assert page.awaits("#facts", category)
        page.give(*files)
        assert page.awaits("#progress", "3 pictures: 1 normal, 1 anomalous, 1 not judged.")
        assert page.until(lambda: page.names() == ["3.png", "1.png"])
        (problem,) = page.texts("#problems li")
        assert problem.startswith(f"{MARKUP}: This is no picture that can be judged.")
        assert page.one("#verdict").text == "✕ anomalous"
        page.give((MARKUP, b"text"))
        assert page.awaits("#verdict", "! not judged")
        assert "PNG, JPEG, BMP, TIFF" in page.one("#chance").text
        assert page.texts("#problems li") == []


def test_what_keeps_an_image_from_its_verdict_is_told_in_words(page, serve, export, normal):
    server = serve(export, "--max-bytes", 10_000, "--max-waiting", 1)
    with page.visit(server, refused=True):
        assert page.awaits("#facts", "part")
        page.give(("large.png", bytes(1_000_000)))
        assert page.awaits("#chance", "The picture is too large. The body must have at most 10,000")
        with socket.create_connection(("127.0.0.1", server.port)) as other:
            head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
            other.sendall(head)  # takes the only place
            page.give(("a.png", normal))
            assert page.awaits("#progress", "The server is busy; a.png is sent again in 1 s.")
        assert page.awaits("#verdict", "✓ normal")
        server.stop()
        page.give(("b.png", normal))
        assert page.awaits("#chance", "The server does not answer")
        assert page.awaits("#gone", "This is as of ")


def test_the_table_has_the_last_100_verdicts_the_newest_first(page, server, category, judged):
    files = [judged["anomalous" if k % 10 == 0 else "normal"][0] for k in range(103)]
    for k, content in enumerate(files[:90]):
        server.judge(content, name=f"{k}.png", category=category)
    with page.visit(server, category):
        assert page.until(lambda: len(page.names()) == 90)
        page.first("Show 89.png").click()
        assert page.shows_images("#verdicts")
        for k, content in enumerate(files[90:], 90):
            server.judge(content, name=f"{k}.png", category=category)
        assert page.until(lambda: page.names() == [f"{k}.png" for k in range(102, 2, -1)])
        assert page.shows_images("#verdicts")  # it stays open
        assert page.script("return document.activeElement.ariaLabel") == "Show 89.png"
        assert page.one("#count").text == "10 of the last 100 anomalous"
        page.one('[data-show="anomalous"]').click()
        assert page.names() == [f"{k}.png" for k in range(100, 0, -10)]


def test_markup_in_a_name_stays_text(page, server, category, normal):
    server.judge(normal, name=MARKUP, category=category)
    with page.visit(server, category):
        assert page.until(lambda: page.names() == [MARKUP])
        assert page.find("#verdicts img") == []
        page.give((MARKUP, normal))
        assert page.awaits("#judged", MARKUP)


def test_a_hidden_page_does_not_ask(page, server, category, normal):
    with page.visit(server, category):
        assert page.awaits("#facts", category)
        page.driver.execute_script(HIDE, True)
        server.judge(normal, name="new.png", category=category)
        page.requests()  # those of before
        page.driver.set_script_timeout(10)
        page.driver.execute_async_script("setTimeout(arguments[0], 2500)")
        assert page.requests() == []
        assert page.names() == []
        page.driver.execute_script(HIDE, False)
        assert page.until(lambda: page.names() == ["new.png"])


def test_labels_are_kept_and_can_be_taken_back(page, server, category, normal):
    ids = [server.judge(normal, name=name, category=category)["id"] for name in ("a.png", "b.png")]

    def corrections() -> list[tuple[str, str]]:
        rows = read_rows(server.store / "corrections.csv")
        return [(row["label"], row["defect_type"]) for row in rows if row["id"] in ids]

    with page.visit(server, category):
        page.first("Defect").click()
        assert page.until(lambda: page.first("Type of defect").is_displayed())
        assert corrections() == [("anomalous", "")]
        page.first("Type of defect").send_keys("crack", page.ENTER)
        assert page.until(lambda: corrections() == [("anomalous", "crack")])
        assert not page.one("#no-store").is_displayed()
    with page.visit(server, category):
        assert page.first("Defect").get_attribute("aria-pressed") == "true"
        assert page.first("Type of defect").get_attribute("value") == "crack"
        assert page.texts('[role="status"]')[1:] == ["missed", ""]
        page.first("Good").send_keys(page.ENTER)
        assert page.until(lambda: corrections() == [("normal", "")])
        assert page.until(lambda: page.first("Good").get_attribute("aria-pressed") == "true")
        page.first("Undo").click()
        assert page.until(lambda: corrections() == [])
        assert page.until(lambda: not page.first("Undo").is_displayed())


def test_the_chart_has_a_line_for_each_quantity_and_shows_alarms(page, server, category):
    with page.visit(server, category):
        assert page.awaits("#standing", "No pictures yet.")
        for pixels in pictures(20, seed=5):
            server.judge(as_png(pixels), category=category)
        assert page.awaits("#standing", "No alarm in 20 pictures.")
        names = ["score", "brightness", "contrast", "sharpness"]
        assert sorted(page.texts("#chart text")[-4:]) == sorted(names)
        assert len(page.find("#chart path.evidence")) == 8  # four of them in the legend
        drawn = page.find("#chart .brightness")[0].get_attribute("d")
        ends = [float(x) for x in re.findall(r"[\d.]+", drawn)[0::2]]
        assert len(ends) == 20
        assert all(a < b for a, b in pairwise(ends))
        assert page.find("#chart .alarm") == []
        for pixels in pictures(20, seed=6, level=60):
            server.judge(as_png(pixels), category=category)
        assert page.awaits("#alarms", "pictures are darker than the fit images")
        assert page.awaits("#standing", "Changed: the last alarm was")
        marks = "[...document.querySelectorAll('.alarm title')].map(x => x.innerHTML)"
        assert any("darker" in x for x in page.script(f"return {marks}"))
        assert "▲ Drift: pictures are darker" in page.one("#verdicts").text


def test_the_category_is_kept_in_the_address_and_applies_to_all(page, server, served, normal):
    one, other = next(served[1]), next(served[1])
    server.judge(normal, name="a.png", category=one)
    with page.visit(server, one):
        assert page.until(lambda: page.names() == ["a.png"])
        page.choose("#category", other)
        assert page.until(lambda: page.names() == [])
        assert page.awaits("#standing", "No pictures yet.")
        page.give(("b.png", normal))
        assert page.until(lambda: page.names() == ["b.png"])
        page.driver.refresh()
        assert page.until(lambda: page.names() == ["b.png"])
        assert page.driver.current_url.endswith(f"#{quote(other)}")
        assert other in page.one("#facts").text


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_all_of_it_and_the_verdict_can_be_read(page, server, category, judged, dark):
    name = "long" * 50 + ".png"
    for pixels in pictures(40, seed=6, level=60):
        server.judge(as_png(pixels), name=name, category=category)
    with page.visit(server, category, refused=True, size=PHONE, dark=dark):
        assert page.awaits("#alarms", "darker")
        page.first("Defect").click()
        page.first("Show").click()
        assert page.shows_images("#verdicts")
        files = {"normal": judged["normal"][0], "anomalous": judged["anomalous"][0], "not": b"text"}
        for word, content in files.items():
            page.give((name, content))
            assert page.awaits("#verdict", word)
            assert page.contrast("#verdict") >= 4.5
        assert page.until(lambda: page.find(".badge.normal"))
        for selector in (".badge.normal", ".badge.anomalous", "#standing", "#judged"):
            assert page.contrast(selector) >= 4.5
        assert page.script("return document.documentElement.scrollWidth") == PHONE[0]
        boxes = "[...document.querySelectorAll('body *')].map((x) => x.getBoundingClientRect())"
        assert page.script(f"return Math.max(...{boxes}.map((x) => x.right))") <= PHONE[0]


def test_a_token_is_asked_for_once_and_goes_with_every_request(
    page, serve, export, normal, tmp_path
):
    (tmp_path / "token").write_text("secret")
    with page.visit(serve(export, "--token-file", tmp_path / "token"), refused=True):
        field = page.one("#token [type=password]")
        assert page.until(field.is_displayed)
        field.send_keys("wrong", page.ENTER)
        assert page.awaits("#token", "That token was refused.")
        field.send_keys("secret", page.ENTER)
        assert page.awaits("#facts", "part")
        assert not page.one("#token").is_displayed()
        page.give(("a.png", normal))
        assert page.shows_images("#pictures")
        page.driver.refresh()
        page.first("Show").click()
        assert page.shows_images("#verdicts")
        assert not page.one("#token").is_displayed()


def test_without_a_store_there_are_no_buttons_and_a_detector_that_is_refused_is_told(
    page, serve, export, normal, tmp_path
):
    own = Path(shutil.copytree(export, tmp_path / "part"))
    server = serve(own)
    server.judge(normal)
    with page.visit(server):
        assert not page.first("Good").is_displayed()
        assert "--store" in page.one("#no-store").text
        description = json.loads((own / "model.json").read_text())
        description["provenance"]["category"] = "nut"
        (own / "model.json").write_text(json.dumps(description))
        assert page.awaits("#reload-error", "A new detector was refused, and the earlier one goes")
