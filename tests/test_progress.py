"""What long work says: a bar in a terminal, rare lines in a log."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest

from anomaly_detection import progress as module
from anomaly_detection.progress import pace, part, progress, say


@pytest.fixture
def impatient(monkeypatch):
    """A line for each item, as if each took half a minute."""
    monkeypatch.setattr(module, "INTERVAL", 0.0)


def test_the_items_come_as_they_are_and_quick_work_says_nothing_in_a_log(capsys):
    assert list(progress(range(1000), "count", "numbers")) == list(range(1000))
    assert list(progress(iter("ab"), "spell", "letters")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "total", "line"),
    [
        (list, None, r"count: 1 of 3 numbers, \d+ numbers/s, 0 s left"),
        (iter, 3, r"count: 1 of 3 numbers, \d+ numbers/s, 0 s left"),
        (iter, None, r"count: 1 numbers, \d+ numbers/s"),
    ],
)
def test_a_log_gets_lines_with_count_speed_and_time_left(impatient, capsys, kind, total, line):
    list(progress(kind("abc"), "count", "numbers", total))
    first, second, *further = capsys.readouterr().err.splitlines()
    assert re.fullmatch(line, first)
    assert second.startswith("count: 2 ")
    assert len(further) == (" of " not in line)  # where all are known, the last says nothing new


@pytest.mark.parametrize(
    ("pace_of", "text"),
    [
        ((57.4, "images"), "57 images/s"),
        ((0.42, "images", 89.4), "0.4 images/s, 89 s left"),
        ((9.94, "images", 90), "9.9 images/s, 2 min left"),
        ((57, "images", 5369), "57 images/s, 89 min left"),
        ((57, "images", 5400), "57 images/s, 1 h 30 min left"),
    ],
)
def test_speeds_and_times_have_as_many_digits_as_one_needs(pace_of, text):
    assert pace(*pace_of) == text


def test_lines_name_the_part_of_the_work_that_they_are_about(capsys):
    with part("fold 2/5"), part("stfpm"):
        say("epoch 1/2")
    say("end")
    assert capsys.readouterr().err == "fold 2/5, stfpm, epoch 1/2\nend\n"


def test_only_the_first_of_several_processes_says_anything(impatient, monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert list(progress(range(2), f"rank {rank}", "numbers")) == [0, 1]
        say(f"rank {rank}")
    lines = capsys.readouterr().err.splitlines()
    assert [line[:6] for line in lines] == ["rank 0", "rank 0"]


LOOP = """
import time
from anomaly_detection import progress
progress.INTERVAL = 0.05
for _ in progress.progress(range(3), "count", "numbers"):
    time.sleep(0.11)  # tqdm draws its bar every 0.1 s
progress.say("end")
"""


def in_terminal(code: str, columns: int) -> str:
    """What Python writes to a terminal of that width."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execv(sys.executable, [sys.executable, "-c", code])
    written = b""
    try:
        while more := os.read(terminal, 4096):
            written += more
    except OSError:  # Linux's way to say that the other side is closed
        pass
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, written
    return written.decode()


def test_a_terminal_gets_a_bar_that_makes_way_for_the_next_line():
    written = in_terminal(LOOP, columns=80)
    assert re.search(r"\rcount:  67%\|█+.*\| 2/3 \[\d\d:\d\d<.*numbers/s\]", written)
    assert re.search(r"\r *\rend\r\n$", written)


def test_a_terminal_without_columns_gets_lines_since_a_bar_would_be_empty():
    written = in_terminal(LOOP, columns=0)
    assert written.startswith("count: 1 of 3 numbers, ")
    assert "\r" not in written.replace("\r\n", "")
