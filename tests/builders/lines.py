"""A folder beside which `watch` runs in a process of its own, and those that its rows go to."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typing_extensions import Self

from builders.detectors import pictures
from builders.projects import ROOT, environment, wait_until
from builders.servers import as_png

KILLED = Path(__file__).with_name("killed.py")


def write(path: Path, seed: int, level: float = 128, padding: int = 0) -> Path:
    """A picture that is renamed into place, with zero bytes behind its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(as_png(pictures(1, seed, level)[0]))
    os.truncate(partial, partial.stat().st_size + padding)
    return partial.rename(path)


def contents_in(*folders: Path) -> Counter[bytes]:
    """How many files of pictures have each content, but for hidden ones."""
    files = (path for folder in folders for path in folder.rglob("[!.]*.png"))
    return Counter(path.read_bytes() for path in files)


@contextlib.contextmanager
def on_another_disk(folder: Path) -> Iterator[Path]:
    """A temporary folder that is in another file system than this one."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == folder.stat().st_dev:
        pytest.skip("needs a file system in /dev/shm")
    with tempfile.TemporaryDirectory(dir=memory) as other:
        yield Path(other)


class Line:
    """A folder, and processes that watch it one after the other, until the block ends."""

    def __init__(self, folder: Path, detector: Path) -> None:
        self.folder, self.detector = folder, detector
        self.inbox, self.out = folder / "inbox", folder / "verdicts.jsonl"
        self.log = folder / "stderr.txt"
        self.inbox.mkdir()
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    @property
    def process(self) -> subprocess.Popen:
        return self.processes[-1]

    @property
    def journal(self) -> Path:
        return self.out.with_suffix(".journal")

    @property
    def stderr(self) -> str:
        """What all of its processes have said."""
        return self.log.read_text()

    def start(
        self,
        *options: object,
        program: Sequence[object] = (sys.executable, "-m", "anomaly_detection"),
        settle: float = 0,
        **variables: str,
    ) -> None:
        command = [*program, "watch", self.inbox, "--detector", self.detector, "--out", self.out]
        with self.log.open("a") as log:
            process = subprocess.Popen(
                list(map(str, [*command, "--settle", settle, *options])),
                stderr=log,
                cwd=self.folder,
                env=environment(**{"PYTHONPATH": str(ROOT)} | variables),
            )
        self.processes.append(process)

    def start_until(self, point: str, name: str, *options: object) -> None:
        """Start one that kills itself at a point of a picture, as in killed.py."""
        self.start(*options, program=[sys.executable, KILLED, point, name])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)

    @property
    def peak_memory(self) -> int:
        """The most bytes that the process has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])

    def rows(self) -> list[dict]:
        """The whole rows of the out file."""
        if not self.out.exists():
            return []
        *whole, _ = self.out.read_text().split("\n")
        return [json.loads(line) for line in whole]

    def wait_for(self, count: int) -> list[dict]:
        """The rows, as soon as there are so many."""

        def are_there() -> bool:
            assert self.process.poll() is None, self.stderr
            return self.out.exists() and self.out.read_bytes().count(b"\n") >= count

        wait_until(are_there)
        return self.rows()

    def wait_for_picture(self, name: str) -> list[dict]:
        """The rows, as soon as the last one is that of a picture."""
        wait_until(lambda: self.rows()[-1:] and Path(self.rows()[-1]["path"]).name == name)
        return self.rows()

    def wait_for_message(self, text: str, count: int = 1) -> None:
        wait_until(lambda: self.stderr.count(text) >= count)


class Receiver(ThreadingHTTPServer):
    """Collects what is posted, until the block ends; refuses it while `is_down`."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.keys: list[str] = []
        self.login: str | None = None
        self.is_down, self.moved_to = False, ""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.thread = threading.Thread(target=self.serve_forever, args=[0.02], daemon=True)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def url(self, login: str = "") -> str:
        return f"http://{login}127.0.0.1:{self.server_port}/verdicts"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.moved_to:
            self.send_response(302)
            self.send_header("Location", self.server.moved_to)
        elif self.server.is_down:
            self.send_response(503)
        else:
            self.server.rows.append(json.loads(content))
            self.server.keys.append(self.headers["Idempotency-Key"])
            self.server.login = self.headers["Authorization"]
            self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Broker:
    """A real mosquitto, until the block ends."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
        if not program:
            pytest.skip("needs mosquitto (Debian: mosquitto)")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        settings = folder / "mosquitto.conf"
        settings.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\n")
        self.command = [program, "-c", str(settings)]
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        wait_until(self._answers)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def subscribe(self, topic: str, received: list[dict]):
        """A client that collects what is published, as soon as the broker has confirmed it."""
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        client, is_ready = Client(CallbackAPIVersion.VERSION2), threading.Event()
        client.on_message = lambda _c, _u, message: received.append(json.loads(message.payload))
        client.on_subscribe = lambda *_: is_ready.set()
        client.connect("127.0.0.1", self.port)
        client.subscribe(topic, qos=1)
        client.loop_start()
        assert is_ready.wait(10)
        return client

    def _answers(self) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0
