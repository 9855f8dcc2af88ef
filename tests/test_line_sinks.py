"""Who is told of verdicts by `watch`: a file, a real receiver, a real broker; and a full disk."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
from base64 import b64decode

import pytest
from builders.lines import Line, Receiver, write
from builders.projects import wait_until


@pytest.fixture
def line(tmp_path, export):
    line = Line(tmp_path, export)
    yield line
    if line.process:
        line.process.kill()
        line.process.wait()


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
