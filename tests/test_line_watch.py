"""`anomaly-detection watch`: real processes beside a real folder, killed at any point."""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from builders.lines import contents_in, on_another_disk, write
from builders.projects import wait_until
from builders.servers import described

from anomaly_detection import Detector
from anomaly_detection.cli import main
from anomaly_detection.data.decode import content_hash
from anomaly_detection.line.journal import Journal
from anomaly_detection.line.watch import Watch


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
    assert all(path.exists() for path in known)
    line.start()
    write(line.inbox / "last.png", 6)
    assert len(line.wait_for_picture("last.png")) == 7


@pytest.mark.parametrize("name", ["inbox", "link/inbox"])
def test_a_relative_folder_and_one_behind_a_link_are_watched(line, name):
    (line.folder / "link").symlink_to(line.folder)
    inbox, line.inbox = line.inbox, Path(name)
    line.start("--move", "done")
    for i in range(3):
        write(inbox / f"{i}.png", i)
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
    """It is one from the start, so that only its growing tells that it is not complete."""
    slow = write(line.inbox / "slow.png", 0)
    write(line.inbox / "whole.png", 1)
    line.start(settle=1)
    num_left = 5  # to be written after the other one is judged
    while num_left:
        os.truncate(slow, slow.stat().st_size + 10)
        time.sleep(0.1)
        num_left -= bool(line.rows())
    first, second = line.wait_for(2)
    assert first["path"].endswith("whole.png")
    assert (second["error"], second["sha256"]) == (None, content_hash(slow.read_bytes()))


def test_a_damaged_picture_is_a_row_but_not_at_once(line):
    content = write(line.folder / "whole.png", 0).read_bytes()
    (line.inbox / "late.png").write_bytes(content[:700])
    (line.inbox / "broken.png").write_bytes(content[:700])
    write(line.inbox / "first.png", 1)
    line.start("--move", line.inbox / "done")
    (first,) = line.wait_for_picture("first.png")  # after it has looked at the others
    (line.inbox / "late.png").write_bytes(content)
    _, late, broken = line.wait_for(3)
    assert (first["error"], late["error"]) == (None, None)
    assert late["path"].endswith("late.png")
    assert f"{line.inbox}/broken.png: must be a whole image" in broken["error"]
    assert broken["path"] == f"{line.inbox}/done/unreadable/broken.png"
    assert line.stop() == 0
    assert Path(broken["path"]).read_bytes() == content[:700]
    assert len(line.rows()) == 3


def test_what_is_no_picture_is_left_alone(line):
    os.mkfifo(line.inbox / "pipe.png")
    for name in (".hidden.png", "notes.txt", ".git/x.png"):
        write(line.inbox / name, 0)
    write(line.inbox / "z.png", 1)
    line.start()
    (row,) = line.wait_for(1)
    assert row["path"].endswith("z.png")
    assert line.stop() == 0
    assert line.rows() == [row]


def test_a_name_that_is_no_unicode_is_escaped(line):
    path = os.fsencode(line.inbox) + b"/\xff.png"
    write(line.folder / "x.png", 0).rename(os.fsdecode(path))
    line.start("--move", line.folder / "done")
    (row,) = line.wait_for(1)
    assert os.fsencode(Path(row["path"]).name) == b"\xff.png"
    assert "\\udcff" in line.out.read_text()


def test_what_may_not_be_read_does_not_stop_the_others(line):
    """Also for root, who loses the right to read everything."""
    program = [sys.executable, "-m", "anomaly_detection"]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv (Debian: util-linux)")
        program = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *program]
    (line.inbox / "secret").mkdir(mode=0)
    locked = write(line.inbox / "locked.png", 1)
    locked.chmod(0)
    line.start(program=program)
    write(line.inbox / "0.png", 0)
    line.wait_for(1)
    assert f"{line.inbox}/secret: Permission denied; pictures in there are not seen" in line.stderr
    assert line.stderr.count(f"{locked}: Permission denied; will try again") == 1
    locked.chmod(0o600)
    assert [row["path"] for row in line.wait_for(2)] == [f"{line.inbox}/0.png", str(locked)]


@pytest.mark.parametrize("place", ["inbox/done", "elsewhere"])
def test_judged_pictures_are_moved_to_where_their_row_says(line, place):
    for i in range(20):
        write(line.inbox / "day" / f"{i}.png", i)
    line.start("--move", line.folder / place)
    line.wait_for(20)
    write(line.inbox / "day" / "3.png", 3)  # a name that is taken there
    line.wait_for(21)
    assert line.stop() == 0
    rows = line.rows()
    for row in rows:
        path = Path(row["path"])
        assert path.is_relative_to(line.folder / place / row["verdict"] / "day")
        assert content_hash(path.read_bytes()) == row["sha256"]
    assert len({row["path"] for row in rows}) == len(rows) == 21
    assert {row["verdict"] for row in rows} == {"normal", "anomalous"}
    assert not [path for path in line.inbox.rglob("*.png") if "done" not in path.parts]


@pytest.fixture
def other_disk(tmp_path):
    with on_another_disk(tmp_path) as folder:
        yield folder


UNCOMMITTED = ["judged", "not committed"]
UNWRITTEN = [*UNCOMMITTED, "committed", "half written"]


@pytest.mark.parametrize(
    ("place", "point"),
    [
        *[("inbox", point) for point in ["committed", "half written", "written"]],
        *[("done", point) for point in [*UNCOMMITTED, "committed", "noted", "moved"]],
        *[("other_disk", point) for point in ["half copied", "copied"]],
    ],
)
def test_a_kill_at_any_point_neither_loses_nor_doubles_a_verdict(line, place, point, request):
    """The points are those of builders/killed.py: between two steps, and within one."""
    done = request.getfixturevalue(place) if place == "other_disk" else line.folder / place
    options = ["--move", done] if done != line.inbox else []
    names = ["0.png", "1.png", "killed.png", "3.png", "4.png"]
    contents = {write(line.inbox / x, i).read_bytes() for i, x in enumerate(names)}
    line.start_until(point, "killed.png", *options)
    assert line.process.wait(60) == -signal.SIGKILL, line.stderr
    assert set(contents_in(line.inbox, done)) == contents, "each is somewhere, and whole"
    assert (line.inbox / "killed.png").exists() == (point != "moved")
    if point in [*UNWRITTEN, "written", "noted"]:  # at the others, it may be
        assert ("killed.png" in line.out.read_text()) == (point not in UNWRITTEN)

    contents.add(write(line.inbox / "last.png", 5).read_bytes())
    line.start(*options)
    line.wait_for_picture("last.png")
    assert line.stop() == 0
    rows = line.rows()
    assert [Path(row["path"]).name for row in rows] == [*names, "last.png"]
    for row in rows:
        assert Path(row["path"]).is_relative_to(done)
        assert content_hash(Path(row["path"]).read_bytes()) == row["sha256"]
    assert contents_in(*{line.inbox, done}) == dict.fromkeys(contents, 1)
    assert list(done.rglob("*.partial")) == []
    assert f"stopped; {3 + (point in UNCOMMITTED)} pictures were judged" in line.stderr
    state, _ = Journal(line.journal).drift_of(rows[0]["detector"])
    assert state["num_images"] == 6, "drift has seen each once"


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [(), ("--move", "done")], ids=["left", "moved"])
def test_20_kills_neither_lose_nor_double_a_verdict(line, options):
    """400 files arrive meanwhile; kill -9 at any moment, also while half a row is written."""
    random.seed(0)

    def deliver(numbers: range) -> None:
        for i in numbers:
            write(line.inbox / f"{i}.png", i)
            time.sleep(0.02)

    at_work = 0
    for number in range(20):
        before = len(line.rows())
        arrivals = threading.Thread(target=deliver, args=[range(20 * number, 20 * number + 20)])
        arrivals.start()
        line.start(*options)
        if number % 2:  # every other one gets to work; the others may still be starting
            wait_until(lambda known=before: len(line.rows()) > known)
        time.sleep(random.uniform(0, 0.5))
        line.stop(signal.SIGKILL)
        arrivals.join()
        at_work += len(line.rows()) > before
        if number % 3 == 0:
            with line.out.open("ab") as file:  # as if it had been killed in the middle of a row
                file.write(b'{"id": "half')
    write(line.inbox / "last.png", 400)
    line.start(*options)
    line.wait_for_picture("last.png")
    assert line.stop() == 0
    rows = line.rows()
    names = Counter(Path(row["path"]).name for row in rows)
    assert names == Counter(["last.png", *(f"{i}.png" for i in range(400))])
    assert len({row["sha256"] for row in rows}) == 401
    assert at_work >= 10  # kills that came while it judged
    if options:
        assert all(Path(row["path"]).is_file() for row in rows)
        assert not list(line.inbox.glob("*.png"))


def test_a_backlog_needs_the_memory_of_a_few_pictures(line):
    """Each is a megabyte, most of it behind the picture's end; `tee` keeps up to 57 of them."""
    peaks = []
    for numbers in (range(5), range(5, 250)):
        for i in numbers:
            write(line.inbox / f"{i}.png", 0, padding=1 << 20)
        line.start()
        line.wait_for(numbers.stop)
        peaks.append(line.peak_memory)
        line.stop()
    assert peaks[1] - peaks[0] < 100e6


def test_a_second_process_and_a_wrong_journal_are_refused(line):
    line.start()
    write(line.inbox / "0.png", 0)
    line.wait_for(1)
    line.start()
    assert line.process.wait(30) == 1
    assert "another process has it" in line.stderr
    line.processes.pop()
    assert line.stop() == 0
    line.journal.write_text("something else " * 100)
    line.start()
    assert line.process.wait(30) == 1
    assert "must be a journal" in line.stderr.splitlines()[-1]


def test_a_detector_that_gives_another_score_here_is_refused(line, export):
    example = json.loads((export / "model.json").read_text())["example"]
    example["score"] += 1
    line.detector = described(export, line.folder / "other", example=example)
    line.start()
    assert line.process.wait(30) == 1
    (text,) = line.stderr.splitlines()
    assert "must give its test picture the recorded score" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("nowhere", "nowhere must be a folder"),
        (". --detector x.onnx", "must exist"),
        (". --detector x", "must be a detector"),
        (". --settle -1", "must be a number of seconds"),
        (". --move .", "--move must be another folder"),
        (". --webhook ftp://x", "--webhook must be an address of http or https"),
        (". --mqtt mqtt://x", "--mqtt must be mqtt://host[:port]/topic"),
        (". --out /proc/v.jsonl", "/proc/v.jsonl must be writable"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, export, arguments, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Watch, "run", lambda _: pytest.fail("it has started"))
    with pytest.raises(SystemExit) as ended:
        main(["watch", "--detector", str(export), "--out", "v.jsonl", *arguments.split()])
    assert text in ended.value.code
    assert "\n" not in ended.value.code


def test_a_folder_that_vanishes_is_waited_for(line):
    write(line.inbox / "0.png", 0)
    line.start()
    line.wait_for(1)
    line.inbox.rename(line.folder / "away")
    line.wait_for_message("will try again")
    (line.folder / "away").rename(line.inbox)
    write(line.inbox / "1.png", 1)
    line.wait_for(2)
    shutil.rmtree(line.inbox)
    line.wait_for_message("will try again", 2)
    line.inbox.mkdir()
    write(line.inbox / "2.png", 2)
    assert len(line.wait_for(3)) == 3
    assert "works again" in line.stderr


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
    assert "alarm" not in line.stderr
    for i in range(60):
        write(line.inbox / f"dark{i:03}.png", i, level=110)
    line.start("--limit", 1000)
    rows = line.wait_for(120)
    alarms = [text for row in rows for text in row["alarms"]]
    assert any(text.startswith("pictures are darker than the fit images") for text in alarms)
    of_scores = next(text for text in alarms if text.startswith("scores are higher"))
    assert "the pictures have changed too" in of_scores
    assert "brightness down" in of_scores
    assert all(f": {text}" in line.stderr for text in alarms)
    assert rows[60]["evidence"]["score"] > 0.5 * before["score"]  # it did not start anew
