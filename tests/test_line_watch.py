"""`watch`: a real process beside a real folder; names, moves, kills, drift, mistakes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from builders.detectors import pictures
from builders.killed import POINTS
from builders.lines import Line, write
from builders.projects import wait_until
from PIL import Image

from anomaly_detection import Detector
from anomaly_detection.line.journal import Journal


@pytest.fixture
def line(tmp_path, export):
    line = Line(tmp_path, export)
    yield line
    if line.process:
        line.process.kill()
        line.process.wait()


def test_each_picture_has_the_verdict_of_predict_and_one_row(line, export):
    known = [write(line.inbox / "night" / f"{i}.png", i) for i in range(3)]
    line.start()
    line.wait_for(3)
    known += [write(line.inbox / f"{i}.png", i) for i in range(3, 6)]
    rows = line.wait_for(6)
    assert line.stop() == 0
    expected = Detector.load(export)
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


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_neither_loses_nor_doubles_a_verdict(line, point):
    for i in range(6):
        write(line.inbox / f"{i}.png", i)
    options = ("--move", line.folder / "done")
    line.start(*options, killed_at=(point, 1 if point == "delivered" else 3))
    assert line.process.wait(60) == -signal.SIGKILL
    known = line.rows()
    assert len(known) < 6
    line.start(*options)
    rows = line.wait_for(6)
    wait_until(lambda: not list(line.inbox.glob("*.png")))
    assert line.stop() == 0
    assert rows[: len(known)] == known
    assert Counter(Path(row["path"]).name for row in rows) == {f"{i}.png": 1 for i in range(6)}
    assert all(Path(row["path"]).is_file() for row in line.rows())
    assert len(line.rows()) == 6


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
