import base64
import csv
import json
import re
import shutil
import socket
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from builders.browser import PHONE, Browser
from builders.detectors import pictures, write_export
from builders.servers import Server, as_png

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
HIDE = "Object.defineProperty(document, 'hidden', { value: arguments[0], configurable: true })"
TURNED = "document.dispatchEvent(new Event('visibilitychange'))"
COLOURS = """
const { color, backgroundColor } = getComputedStyle(document.querySelector(arguments[0]));
return [color, backgroundColor, getComputedStyle(document.body).backgroundColor];
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("exports") / "part")


@pytest.fixture(scope="module")
def judged(export) -> dict:
    """A picture's file for each verdict, and what the detector says of it."""
    detector = Detector.load(export)
    files = [as_png(x) for x in pictures(40, seed=3)]
    return {found.verdict: (x, found) for x in files for found in [detector.predict(x)]}


def rename(export: Path, category: str) -> None:
    """Make an export one of another category."""
    description = export / "model.json"
    values = json.loads(description.read_text())
    description.write_text(json.dumps(values | {"provenance": {"category": category}}))


@pytest.fixture
def serve(export, tmp_path):
    """Starts servers, which are stopped in the end."""
    running = []

    def start(*options: object, detectors: tuple[Path, ...] = ()) -> Server:
        running.append(Server(tmp_path, *(detectors or [export]), *options))
        return running[-1]

    yield start
    for one in running:
        one.stop()


def judge(server: Server, content: bytes, name: str = "a.png", category: str = "part") -> None:
    query = urlencode({"name": name, "category": category})
    assert server.predict(content, f"?{query}").status == 200


class Page(Browser):
    """The page of a server, which must be quiet and ask nobody else.

    `refused` says that the server may refuse something, which Chromium writes to its console.
    """

    def __init__(self, server: Server, refused: bool = False, **options) -> None:
        self.server, self.refused = server, refused
        super().__init__(server.url, **options)

    def __exit__(self, kind: object, *others: object) -> None:
        try:
            if kind is None:
                said = self.console()
                assert said == [x for x in said if self.refused and "Failed to load" in x]
                requests = self.requests()
                assert requests == [x for x in requests if x.startswith(f"{self.server.url}/")]
        finally:
            super().__exit__(kind, *others)

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

    def num_loaded(self, selector: str) -> int:
        pictures = f"[...document.querySelectorAll('{selector} img')]"
        return self.script(f"return {pictures}.filter((img) => img.naturalWidth > 0).length")

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


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_a_picture_gets_the_verdict_of_the_detector(way, judged, serve, tmp_path):
    with Page(serve()) as page:
        for verdict, (content, found) in judged.items():
            name = f"{verdict} 1.png"
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
            assert page.until(lambda: page.num_loaded("#pictures") == 2)


def test_several_pictures_are_judged_in_turn_and_what_is_none_is_told(judged, serve):
    files = [("1.png", judged["normal"][0]), (MARKUP, b"text"), ("3.png", judged["anomalous"][0])]
    with Page(serve(), refused=True) as page:
        page.give(*files)
        assert page.awaits("#progress", "3 pictures: 1 normal, 1 anomalous, 1 not judged.")
        assert page.names() == ["3.png", "1.png"]
        (problem,) = page.texts("#problems li")
        assert problem.startswith(f"{MARKUP}: This is no picture that can be judged.")
        assert page.one("#verdict").text == "✕ anomalous"
        page.give((MARKUP, b"text"))
        assert page.awaits("#verdict", "! not judged")
        assert "PNG, JPEG, BMP, TIFF" in page.one("#chance").text
        assert page.texts("#problems li") == []


def test_what_keeps_a_picture_from_its_verdict_is_told_in_words(judged, serve):
    content, _ = judged["normal"]
    server = serve("--max-bytes", 10_000, "--max-waiting", 1)
    with Page(server, refused=True) as page:
        assert page.awaits("#facts", "part")
        page.give(("large.png", bytes(1_000_000)))
        assert page.awaits("#chance", "The picture is too large. The body must have at most 10,000")
        with socket.create_connection(("127.0.0.1", server.port)) as other:
            head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
            other.sendall(head)  # takes the only place
            page.give(("a.png", content))
            assert page.awaits("#progress", "The server is busy; a.png is sent again in 1 s.")
        assert page.awaits("#verdict", "✓ normal")
        server.stop()
        page.give(("b.png", content))
        assert page.awaits("#chance", "The server does not answer")
        assert page.awaits("#gone", "This is as of ")


def test_the_table_has_the_last_100_verdicts_the_newest_first(judged, serve):
    files = [judged["anomalous" if k % 10 == 0 else "normal"][0] for k in range(103)]
    server = serve()
    for k, content in enumerate(files[:90]):
        judge(server, content, f"{k}.png")
    with Page(server) as page:
        assert page.until(lambda: len(page.names()) == 90)
        page.first("Show 89.png").click()
        assert page.until(lambda: page.num_loaded("#verdicts") == 2)
        for k, content in enumerate(files[90:], 90):
            judge(server, content, f"{k}.png")
        assert page.until(lambda: page.names() == [f"{k}.png" for k in range(102, 2, -1)])
        assert page.num_loaded("#verdicts") == 2  # it stays open
        assert page.script("return document.activeElement.ariaLabel") == "Show 89.png"
        assert page.one("#count").text == "10 of the last 100 anomalous"
        page.one('[data-show="anomalous"]').click()
        assert page.names() == [f"{k}.png" for k in range(100, 0, -10)]


def test_markup_in_a_name_stays_text(judged, serve):
    server = serve()
    judge(server, judged["normal"][0], MARKUP)
    with Page(server) as page:
        assert page.until(lambda: page.names() == [MARKUP])
        assert page.find("#verdicts img") == []
        page.give((MARKUP, judged["normal"][0]))
        assert page.awaits("#judged", MARKUP)


def test_a_hidden_page_does_not_ask(judged, serve):
    server = serve()
    with Page(server) as page:
        assert page.awaits("#facts", "part")
        page.driver.execute_script(HIDE, True)
        judge(server, judged["normal"][0], "new.png")
        page.script(TURNED)
        page.driver.set_script_timeout(10)
        page.driver.execute_async_script("setTimeout(arguments[0], 2500)")
        assert page.names() == []
        page.driver.execute_script(HIDE, False)
        page.script(TURNED)
        assert page.until(lambda: page.names() == ["new.png"])


def test_labels_are_kept_and_can_be_taken_back(judged, serve, tmp_path):
    server = serve("--store", tmp_path)
    judge(server, judged["normal"][0], "other.png")
    judge(server, judged["normal"][0], "cell.png")

    def corrections() -> list[tuple[str, str]]:
        with (tmp_path / "corrections.csv").open() as file:
            return [(row["label"], row["defect_type"]) for row in csv.DictReader(file)]

    with Page(server) as page:
        page.first("Defect").click()
        assert page.until(lambda: page.first("Type of defect").is_displayed())
        assert corrections() == [("anomalous", "")]
        page.first("Type of defect").send_keys("crack", page.ENTER)
        assert page.until(lambda: corrections() == [("anomalous", "crack")])
        assert not page.one("#no-store").is_displayed()
    with Page(server) as page:
        assert page.first("Defect").get_attribute("aria-pressed") == "true"
        assert page.first("Type of defect").get_attribute("value") == "crack"
        assert page.texts('[role="status"]')[1:] == ["missed", ""]
        page.first("Good").send_keys(page.ENTER)
        assert page.until(lambda: corrections() == [("normal", "")])
        assert page.until(lambda: page.first("Good").get_attribute("aria-pressed") == "true")
        page.first("Undo").click()
        assert page.until(lambda: corrections() == [])
        assert page.until(lambda: not page.first("Undo").is_displayed())


def test_without_a_store_there_are_no_buttons_for_labels(judged, serve):
    server = serve()
    judge(server, judged["normal"][0])
    with Page(server) as page:
        assert not page.first("Good").is_displayed()
        assert "--store" in page.one("#no-store").text


def test_the_chart_has_a_line_for_each_quantity_and_shows_alarms(judged, serve):
    server = serve("--limit", 300)
    with Page(server) as page:
        assert page.awaits("#standing", "No pictures yet.")
        for pixels in pictures(20, seed=5):
            judge(server, as_png(pixels))
        assert page.awaits("#standing", "No alarm in 20 pictures.")
        lines = "path.evidence"
        names = ["score", "brightness", "contrast", "sharpness"]
        assert sorted(page.texts("#chart text")[-4:]) == sorted(names)
        assert len(page.find(f"#chart {lines}")) == 8  # four of them in the legend
        drawn = page.find("#chart .brightness")[0].get_attribute("d")
        ends = [float(x) for x in re.findall(r"[\d.]+", drawn)[0::2]]
        assert len(ends) == 20
        assert all(a < b for a, b in pairwise(ends))
        assert page.find("#chart .alarm") == []
        for pixels in pictures(20, seed=6, level=60):
            judge(server, as_png(pixels))
        assert page.awaits("#alarms", "pictures are darker than the fit images")
        assert page.awaits("#standing", "Changed: the last alarm was")
        marks = page.script(
            "return [...document.querySelectorAll('.alarm title')].map(x => x.innerHTML)"
        )
        assert any("darker" in x for x in marks)
        assert "▲ Drift: pictures are darker" in page.one("#verdicts").text


def test_a_token_is_asked_for_once_and_goes_with_every_request(judged, serve, tmp_path):
    (tmp_path / "token").write_text("secret")
    with Page(serve("--token-file", tmp_path / "token"), refused=True) as page:
        field = page.one("#token [type=password]")
        assert page.until(field.is_displayed)
        field.send_keys("wrong", page.ENTER)
        assert page.awaits("#token", "That token was refused.")
        field.send_keys("secret", page.ENTER)
        assert page.awaits("#facts", "part")
        assert not page.one("#token").is_displayed()
        page.give(("a.png", judged["normal"][0]))
        assert page.until(lambda: page.num_loaded("#pictures") == 2)
        page.driver.refresh()
        page.first("Show").click()
        assert page.until(lambda: page.num_loaded("#verdicts") == 2)
        assert not page.one("#token").is_displayed()


def test_the_category_is_kept_in_the_address_and_applies_to_all(export, judged, serve, tmp_path):
    other = shutil.copytree(export, tmp_path / "other")
    rename(other, "other part")
    server = serve(detectors=(export, other))
    judge(server, judged["normal"][0], "a.png")
    with Page(server) as page:
        assert page.until(lambda: page.names() == ["a.png"])
        page.choose("#category", "other part")
        assert page.until(lambda: page.names() == [])
        assert page.awaits("#standing", "No pictures yet.")
        page.give(("b.png", judged["normal"][0]))
        assert page.until(lambda: page.names() == ["b.png"])
        page.driver.refresh()
        assert page.until(lambda: page.names() == ["b.png"])
        assert page.driver.current_url.endswith("#other%20part")
        assert "other part" in page.one("#facts").text


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_all_of_it_and_the_verdict_can_be_read(dark, judged, serve, tmp_path):
    server = serve("--store", tmp_path, "--limit", 20)
    for pixels in pictures(20, seed=6, level=60):
        judge(server, as_png(pixels), "long" * 50 + ".png")
    with Page(server, refused=True, size=PHONE, dark=dark) as page:
        assert page.awaits("#alarms", "darker")
        page.first("Defect").click()
        page.first("Show").click()
        assert page.until(lambda: page.num_loaded("#verdicts") == 2)
        files = {"normal": judged["normal"][0], "anomalous": judged["anomalous"][0], "not": b"text"}
        for word, content in files.items():
            page.give(("long" * 50 + ".png", content))
            assert page.awaits("#verdict", word)
            assert page.contrast("#verdict") >= 4.5
        assert page.until(lambda: page.find(".badge.normal"))
        for selector in (".badge.normal", ".badge.anomalous", "#standing", "#judged"):
            assert page.contrast(selector) >= 4.5
        assert page.script("return document.documentElement.scrollWidth") == PHONE[0]
        edges = (
            "[...document.querySelectorAll('body *')].map((x) => x.getBoundingClientRect().right)"
        )
        assert page.script(f"return Math.max(...{edges})") <= PHONE[0]


def test_a_detector_that_could_not_be_exchanged_is_told(export, serve, tmp_path):
    own = shutil.copytree(export, tmp_path / "part")
    with Page(serve(detectors=(own,))) as page:
        assert page.awaits("#facts", "part")
        rename(own, "nut")
        assert page.awaits("#reload-error", "A new detector was refused, and the earlier one goes")
