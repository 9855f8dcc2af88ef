"""`watch`: a real process beside a real folder, a real receiver, a real broker; killed often."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from builders.detectors import pictures, write_export
from builders.projects import ROOT, environment, wait_until
from PIL import Image

from anomaly_detection import Detector
from anomaly_detection.line.journal import Journal


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("exports") / "part")


def write(path: Path, seed: int) -> Path:
    """A picture that is renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    (planes,) = pictures(1, seed)
    Image.fromarray(np.moveaxis(planes, 0, -1)).save(partial, "PNG")
    partial.rename(path)
    return path


class Line:
    """A folder, and processes that watch it one after the other."""

    def __init__(self, folder: Path, detector: Path) -> None:
        self.folder, self.detector = folder, detector
        self.inbox, self.out = folder / "inbox", folder / "verdicts.jsonl"
        self.inbox.mkdir()
        self.process: subprocess.Popen | None = None

    def start(
        self, *options: object, settle: float = 0, cwd: Path | None = None, **variables: str
    ) -> None:
        arguments = ["watch", self.inbox, "--detector", self.detector, "--out", self.out]
        arguments += ["--settle", settle, *options]
        self.said = (self.folder / "said.txt").open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "anomaly_detection", *map(str, arguments)],
            stderr=self.said,
            cwd=cwd,
            env=environment() | {"PYTHONPATH": str(ROOT)} | variables,
        )

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(30)

    @property
    def messages(self) -> str:
        return (self.folder / "said.txt").read_text()

    def rows(self) -> list[dict]:
        if not self.out.exists():
            return []
        *whole, _ = self.out.read_text().split("\n")
        return [json.loads(line) for line in whole]

    def wait_for(self, count: int) -> list[dict]:
        def are_there() -> bool:
            assert self.process
            assert self.process.poll() is None, self.messages
            return self.out.exists() and self.out.read_bytes().count(b"\n") >= count

        wait_until(are_there)
        return self.rows()


@pytest.fixture
def line(tmp_path, detector):
    line = Line(tmp_path, detector)
    yield line
    if line.process:
        line.process.kill()
        line.process.wait()


def test_each_picture_has_the_verdict_of_predict_and_one_row(line, detector):
    known = [write(line.inbox / "night" / f"{i}.png", i) for i in range(3)]
    line.start()
    line.wait_for(3)
    known += [write(line.inbox / f"{i}.png", i) for i in range(3, 6)]
    rows = line.wait_for(6)
    assert line.stop() == 0
    expected = Detector.load(detector)
    assert [row["path"] for row in rows] == list(map(str, known))
    for row in rows:
        found = expected.predict(row["path"])
        assert row["score"] == pytest.approx(found.score)
        assert (row["verdict"], row["p_value"]) == (found.verdict, found.p_value)
        assert row["brightness"] == found.statistics.brightness
    assert [Path(path).exists() for path in known] == [True] * 6
    line.start()
    write(line.inbox / "last.png", 6)
    assert len(line.wait_for(7)) == 7


@pytest.mark.parametrize("name", ["inbox", "link/inbox"])
def test_a_relative_folder_and_one_behind_a_link_are_watched(line, name):
    (line.folder / "link").symlink_to(line.folder)
    out, line.inbox = line.inbox, Path(name)
    line.start("--move", "done", cwd=line.folder)
    for i in range(3):
        write(out / f"{i}.png", i)
        rows = line.wait_for(i + 1)
    place = line.folder / "done" / rows[2]["verdict"] / "2.png"
    assert rows[2]["path"] == str(place)
    wait_until(place.exists)


def test_another_picture_of_the_same_name_is_judged_too(line):
    write(line.inbox / "part.png", 0)
    line.start()
    line.wait_for(1)
    write(line.inbox / "part.png", 1)
    first, second = line.wait_for(2)
    assert first["path"] == second["path"]
    assert first["sha256"] != second["sha256"]


def test_a_picture_that_is_still_written_waits(line):
    content = write(line.folder / "whole.png", 0).read_bytes()
    line.start(settle=1)
    with (line.inbox / "slow.png").open("wb") as file:
        for start in range(0, len(content), 500):
            file.write(content[start : start + 500])
            file.flush()
            time.sleep(0.3)
    (row,) = line.wait_for(1)
    assert row["error"] is None


def test_a_damaged_picture_is_a_row_but_not_at_once(line):
    content = write(line.folder / "whole.png", 0).read_bytes()
    (line.inbox / "late.png").write_bytes(content[:700])
    (line.inbox / "broken.png").write_bytes(content[:700])
    line.start()
    time.sleep(2)
    (line.inbox / "late.png").write_bytes(content)
    rows = {Path(row["path"]).name: row for row in line.wait_for(2)}
    assert rows["late.png"]["error"] is None
    assert f"{line.inbox}/broken.png: must be a whole image" in rows["broken.png"]["error"]


def test_what_is_no_picture_is_left_alone(line):
    os.mkfifo(line.inbox / "pipe.png")
    for name in (".hidden.png", "notes.txt", ".git/x.png"):
        write(line.folder / "x.png", 0)
        (line.inbox / name).parent.mkdir(exist_ok=True)
        shutil.copy(line.folder / "x.png", line.inbox / name)
    write(line.inbox / "z.png", 1)
    line.start()
    (row,) = line.wait_for(1)
    assert row["path"].endswith("z.png")


def test_a_name_that_is_no_unicode_is_escaped(line):
    path = os.fsencode(line.inbox) + b"/\xff.png"
    write(line.folder / "x.png", 0).rename(os.fsdecode(path))
    line.start("--move", line.folder / "done")
    (row,) = line.wait_for(1)
    assert os.fsencode(Path(row["path"]).name) == b"\xff.png"
    assert "\\udcff" in line.out.read_text()


def test_a_folder_that_may_not_be_read_does_not_stop_the_others(line):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (line.inbox / "secret").mkdir(mode=0)
    line.start()
    write(line.inbox / "0.png", 0)
    line.wait_for(1)
    assert "pictures in there are not seen" in line.messages


@pytest.mark.parametrize("place", ["inbox/done", "elsewhere"])
def test_judged_pictures_are_moved_to_where_their_row_says(line, place):
    for i in range(20):
        write(line.inbox / "day" / f"{i}.png", i)
    (line.inbox / "x.png").write_text("no picture")
    line.start("--move", line.folder / place)
    line.wait_for(21)
    write(line.inbox / "day" / "3.png", 100)  # a name that is taken there
    write(line.inbox / "day" / "3.png", 3)
    rows = line.wait_for(22)
    time.sleep(1)
    line.stop()
    for row in rows:
        path = Path(row["path"])
        kind = row["verdict"] or "unreadable"
        assert path.is_relative_to(line.folder / place / kind)
        assert path.is_file()
    assert {row["verdict"] for row in rows} == {"normal", "anomalous", None}
    left = [x for x in line.inbox.rglob("*.png") if "done" not in x.parts]
    assert left == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [(), ("--move", "done")], ids=["left", "moved"])
def test_20_kills_neither_lose_nor_double_a_verdict(line, options):
    """400 files arrive meanwhile; kill -9 at any moment, also while half a row is written."""
    random.seed(0)
    sources = [write(line.folder / "source" / f"{i}.png", i).read_bytes() for i in range(50)]
    options = [line.folder / x if x == "done" else x for x in options]

    def deliver(numbers: range) -> None:
        for i in numbers:
            partial = line.inbox / f".{i}.partial"
            partial.write_bytes(sources[i % 50] + str(i).encode())  # different contents
            partial.rename(line.inbox / f"{i}.png")
            time.sleep(0.05)

    at_work = 0
    for number in range(20):
        before = len(line.rows())
        arrivals = threading.Thread(target=deliver, args=[range(20 * number, 20 * number + 20)])
        arrivals.start()
        line.start(*options)
        if number % 2:  # every other one gets to work; the others may still be starting
            wait_until(lambda known=before: len(line.rows()) > known)
        time.sleep(random.uniform(0, 1))
        line.stop(signal.SIGKILL)
        arrivals.join()
        at_work += len(line.rows()) > before
        if number % 3 == 0:
            with line.out.open("ab") as file:  # as if it had been killed in the middle of a row
                file.write(b'{"id": "half')
    line.start(*options)
    line.wait_for(400)
    time.sleep(1)
    assert line.stop() == 0
    rows = line.rows()
    assert len(rows) == 400
    names = Counter(Path(row["path"]).name for row in rows)
    assert names == Counter(f"{i}.png" for i in range(400))
    assert len({row["sha256"] for row in rows}) == 400
    assert at_work >= 10  # kills that came while it judged
    if options:
        assert all(Path(row["path"]).is_file() for row in rows)
        assert not list(line.inbox.glob("*.png"))


def test_a_backlog_needs_the_memory_of_a_few_pictures(line):
    """Each is a megabyte, most of it behind the picture's end."""
    content = write(line.folder / "x.png", 0).read_bytes() + bytes(1 << 20)
    for i in range(300):
        (line.inbox / f"{i}.png").write_bytes(content + str(i).encode())

    def peak() -> int:
        (kilobytes,) = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(kilobytes)

    line.start()
    pid = line.process.pid
    line.wait_for(10)
    before = peak()
    line.wait_for(300)
    assert peak() - before < 100_000


def test_a_second_process_and_a_wrong_journal_are_refused(line):
    line.start()
    write(line.inbox / "0.png", 0)
    line.wait_for(1)
    second = Line.__new__(Line)
    second.__dict__.update(line.__dict__)
    second.start()
    assert second.process.wait(30) == 1
    assert "another process has it" in line.messages
    line.stop()
    line.out.with_suffix(".journal").write_text("something else " * 100)
    line.start()
    assert line.process.wait(30) == 1
    assert "must be a journal" in line.messages.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere", "--detector", "x.onnx", "--out", "v.jsonl"), "nowhere must be a folder"),
        ((".", "--detector", "x.onnx", "--out", "v.jsonl"), "must exist"),
        ((".", "--detector", "x", "--out", "v", "--settle", "-1"), "must be a number of seconds"),
        ((".", "--detector", "x", "--out", "v", "--move", "."), "--move must be another folder"),
        ((".", "--detector", "x", "--out", "v", "--webhook", "ftp://x"), "must be a detector"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, text):
    done = subprocess.run(
        [sys.executable, "-m", "anomaly_detection", "watch", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_detector_that_gives_another_score_here_is_refused(line, tmp_path):
    shutil.copytree(line.detector, tmp_path / "other")
    path = tmp_path / "other" / "model.json"
    content = json.loads(path.read_text())
    content["example"]["score"] += 1
    path.write_text(json.dumps(content))
    line.detector = tmp_path / "other"
    line.start()
    assert line.process.wait(30) == 1
    assert "must give its test picture the recorded score" in line.messages


def test_a_folder_that_vanishes_is_waited_for(line):
    write(line.inbox / "0.png", 0)
    line.start()
    line.wait_for(1)
    line.inbox.rename(line.folder / "away")
    wait_until(lambda: "will try again" in line.messages)
    (line.folder / "away").rename(line.inbox)
    write(line.inbox / "1.png", 1)
    line.wait_for(2)
    shutil.rmtree(line.inbox)
    wait_until(lambda: line.messages.count("will try again") == 2)
    line.inbox.mkdir()
    write(line.inbox / "2.png", 2)
    assert len(line.wait_for(3)) == 3
    assert "works again" in line.messages


def test_network_drives_are_polled(line):
    line.start("--poll", 0.2)
    write(line.inbox / "0.png", 0)
    line.wait_for(1)


def test_drift_is_said_and_goes_on_after_a_restart(line):
    for i in range(60):
        write(line.inbox / f"{i:03}.png", i + 1000)
    line.start("--limit", 1000)
    line.wait_for(60)
    line.stop()
    before = line.rows()[-1]["evidence"]
    assert set(before) == {"score", "brightness", "contrast", "sharpness"}
    assert "alarm" not in line.messages
    for i in range(60):
        (planes,) = pictures(1, seed=i, level=110)  # darker
        Image.fromarray(np.moveaxis(planes, 0, -1)).save(line.inbox / f"dark{i:03}.png")
    line.start("--limit", 1000)
    rows = line.wait_for(120)
    alarms = [text for row in rows for text in row["alarms"]]
    assert any(text.startswith("pictures are darker than the fit images") for text in alarms)
    of_scores = next(text for text in alarms if text.startswith("scores are higher"))
    assert "the pictures have changed too" in of_scores
    assert "brightness down" in of_scores
    assert all(f": {text}" in line.messages for text in alarms)
    assert rows[60]["evidence"]["score"] > 0.5 * before["score"]  # it did not start anew


class Receiver(ThreadingHTTPServer):
    """Collects what is posted; refuses while `is_down`."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.keys: list[str] = []
        self.is_down, self.moved_to = False, ""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if receiver.moved_to:
                    self.send_response(302)
                    self.send_header("Location", receiver.moved_to)
                    return self.end_headers()
                if not receiver.is_down:
                    receiver.rows.append(json.loads(content))
                    receiver.keys.append(self.headers["Idempotency-Key"])
                    receiver.login = self.headers["Authorization"]
                self.send_response(503 if receiver.is_down else 200)
                self.end_headers()

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def test_a_webhook_gets_every_row_also_those_of_its_downtime(line):
    receiver = Receiver()
    url = f"http://user:secret@127.0.0.1:{receiver.server_port}/verdicts"
    receiver.is_down = True
    line.start("--webhook", url, ANOMALY_DETECTION_WEBHOOK_TOKEN="token")
    for i in range(10):
        write(line.inbox / f"{i}.png", i)
    line.wait_for(10)
    wait_until(lambda: "answers with status 503" in line.messages)
    line.stop()
    assert "10 verdicts wait until the next start" in line.messages
    assert "secret" not in line.messages
    receiver.is_down = False
    line.start("--webhook", url, ANOMALY_DETECTION_WEBHOOK_TOKEN="token")
    wait_until(lambda: len(receiver.rows) >= 10)
    assert receiver.rows == line.rows()
    assert receiver.keys == [row["id"] for row in line.rows()]
    assert receiver.login == "Bearer token"
    line.stop()
    write(line.inbox / "last.png", 11)
    line.start("--webhook", url)
    wait_until(lambda: len(receiver.rows) == 11)
    assert b64decode(receiver.login.removeprefix("Basic ")) == b"user:secret"
    receiver.shutdown()
    receiver.server_close()


def test_a_webhook_that_redirects_has_not_got_the_row(line):
    receiver = Receiver()
    url = f"http://127.0.0.1:{receiver.server_port}/"
    receiver.moved_to = f"{url}elsewhere"
    line.start("--webhook", url)
    write(line.inbox / "0.png", 0)
    wait_until(lambda: "answers with status 302" in line.messages)
    receiver.moved_to = ""
    wait_until(lambda: len(receiver.rows) == 1)
    receiver.shutdown()
    receiver.server_close()


@pytest.fixture
def broker(tmp_path):
    """A real mosquitto; `start` and `stop`."""
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    if not program:
        pytest.skip("needs mosquitto (Debian: mosquitto)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = tmp_path / "mosquitto.conf"
    settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    running = []

    class Broker:
        def __init__(self) -> None:
            self.port = port

        def start(self) -> None:
            running.append(subprocess.Popen([program, "-c", settings], stderr=subprocess.DEVNULL))
            wait_until(self.answers)

        def answers(self) -> bool:
            with socket.socket() as connection:
                return connection.connect_ex(("127.0.0.1", port)) == 0

        def stop(self) -> None:
            running[-1].terminate()
            running[-1].wait()

    broker = Broker()
    broker.start()
    yield broker
    for process in running:
        process.kill()
        process.wait()


def test_a_broker_gets_every_row_also_after_it_was_away(line, broker):
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion

    received: list[dict] = []

    def subscribe() -> Client:
        client = Client(CallbackAPIVersion.VERSION2)
        client.on_message = lambda _c, _u, message: received.append(json.loads(message.payload))
        ready = threading.Event()
        client.on_subscribe = lambda *_: ready.set()
        client.connect("127.0.0.1", broker.port)
        client.subscribe("line/1", qos=1)
        client.loop_start()
        assert ready.wait(10)
        return client

    client = subscribe()
    line.start("--mqtt", f"mqtt://127.0.0.1:{broker.port}/line/1")
    for i in range(5):
        write(line.inbox / f"{i}.png", i)
    wait_until(lambda: len(received) >= 5)
    client.loop_stop()
    broker.stop()
    for i in range(5, 10):
        write(line.inbox / f"{i}.png", i)
    line.wait_for(10)
    wait_until(lambda: "will try again" in line.messages)
    broker.start()
    client = subscribe()
    wait_until(lambda: {row["id"] for row in received} == {row["id"] for row in line.rows()})
    client.loop_stop()
    assert sorted(received, key=lambda row: row["path"])[0] == line.rows()[0]


def test_a_full_disk_is_waited_for(line):
    """A file system of 8 MB, which something else has filled."""
    small = line.folder / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        line.out = small / "verdicts.jsonl"
        line.start()
        write(line.inbox / "0.png", 0)
        line.wait_for(1)
        with contextlib.suppress(OSError), (small / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for i in range(1, 40):
            write(line.inbox / f"{i}.png", i)
        wait_until(lambda: "will try again" in line.messages)
        (small / "filler").unlink()
        rows = line.wait_for(40)
        assert len({row["path"] for row in rows}) == len(rows) == 40
        assert "works again" in line.messages
    finally:
        line.stop()
        subprocess.run(["umount", str(small)], check=True)


def test_a_file_that_was_moved_away_is_made_anew_without_old_rows(line):
    line.start()
    write(line.inbox / "0.png", 0)
    line.wait_for(1)
    line.out.rename(line.folder / "verdicts.1.jsonl")
    write(line.inbox / "1.png", 1)
    (row,) = line.wait_for(1)
    assert row["path"].endswith("1.png")


def test_entries_of_pictures_that_are_gone_are_forgotten_when_all_sinks_have_them(tmp_path):
    journal = Journal(tmp_path / "journal")
    for i in range(10):
        with journal.transaction():
            journal.add({"path": f"{i}.png"}, f"{i}.png", "1")
    journal.start_of("new")
    assert journal.oldest(3, [], 0, 100) == [(i + 1, f"{i}.png") for i in range(7)]
    assert journal.oldest(3, [], 5, 100) == [(6, "5.png"), (7, "6.png")]
    assert journal.oldest(3, ["nobody"], 0, 100) == []
    assert len(journal.oldest(3, ["new"], 0, 5)) == 5
    journal.forget([1, 2])
    assert [entry.number for entry in journal.after(0, 2)] == [3, 4]
