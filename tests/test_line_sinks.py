"""Where `watch` delivers its rows: a file, a real receiver of webhooks, a real MQTT broker."""

import contextlib
import subprocess
from base64 import b64decode

import pytest
from builders.lines import Broker, Receiver, write
from builders.projects import wait_until


@pytest.fixture
def receiver():
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def broker(tmp_path):
    with Broker(tmp_path) as broker:
        yield broker


def test_a_webhook_gets_every_row_also_those_of_its_downtime(line, receiver):
    url, token = receiver.url("user:secret@"), {"ANOMALY_DETECTION_WEBHOOK_TOKEN": "token"}
    receiver.is_down = True
    line.start("--webhook", url, **token)
    for i in range(10):
        write(line.inbox / f"{i}.png", i)
    line.wait_for(10)
    line.wait_for_message("answers with status 503")
    line.stop()
    assert "10 verdicts wait until the next start" in line.stderr
    assert "secret" not in line.stderr
    receiver.is_down = False
    line.start("--webhook", url, **token)
    wait_until(lambda: len(receiver.rows) >= 10)
    assert receiver.rows == line.rows()
    assert receiver.keys == [row["id"] for row in line.rows()]
    assert receiver.login == "Bearer token"
    line.stop()
    write(line.inbox / "last.png", 11)
    line.start("--webhook", url)
    wait_until(lambda: len(receiver.rows) == 11)
    assert b64decode(receiver.login.removeprefix("Basic ")) == b"user:secret"


def test_a_webhook_that_redirects_has_not_got_the_row(line, receiver):
    receiver.moved_to = f"{receiver.url()}/elsewhere"
    line.start("--webhook", receiver.url())
    write(line.inbox / "0.png", 0)
    line.wait_for_message("answers with status 302")
    receiver.moved_to = ""
    wait_until(lambda: receiver.rows)
    assert receiver.rows == line.rows()


def test_a_broker_gets_every_row_also_after_it_was_away(line, broker):
    received: list[dict] = []
    client = broker.subscribe("line/1", received)
    line.start("--mqtt", f"mqtt://127.0.0.1:{broker.port}/line/1")
    for i in range(5):
        write(line.inbox / f"{i}.png", i)
    wait_until(lambda: len(received) >= 5)
    client.loop_stop()
    broker.stop()
    for i in range(5, 10):
        write(line.inbox / f"{i}.png", i)
    line.wait_for(10)
    line.wait_for_message("will try again")
    broker.start()
    client = broker.subscribe("line/1", received)
    wait_until(lambda: {row["id"] for row in received} == {row["id"] for row in line.rows()})
    client.loop_stop()
    assert all(row in line.rows() for row in received)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("options", [(), ("--journal", "journal")], ids=["beside", "elsewhere"])
def test_a_full_disk_is_waited_for(small_disk, line, options):
    """The journal is there as well, or has room on another one."""
    line.out = small_disk / "verdicts.jsonl"
    line.start(*options)
    write(line.inbox / "0.png", 0)
    line.wait_for(1)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    for i in range(1, 40):
        write(line.inbox / f"{i}.png", i)
    line.wait_for_message("will try again")
    filler.unlink()
    rows = line.wait_for(40)
    assert len({row["path"] for row in rows}) == len(rows) == 40
    assert "works again" in line.stderr


def test_a_file_that_was_moved_away_is_made_anew_without_old_rows(line):
    line.start()
    write(line.inbox / "0.png", 0)
    line.wait_for(1)
    line.out.rename(line.folder / "verdicts.1.jsonl")
    write(line.inbox / "1.png", 1)
    (row,) = line.wait_for(1)
    assert row["path"].endswith("1.png")
