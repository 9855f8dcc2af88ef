"""A folder that is watched, by processes one after the other, and who is told of the verdicts."""

import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from builders.detectors import pictures
from builders.projects import ROOT, environment, wait_until


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
        self,
        *options: object,
        settle: float = 0,
        cwd: Path | None = None,
        killed_at: tuple[str, int] | None = None,
        **variables: str,
    ) -> None:
        """Watch, perhaps until the process kills itself at a point of `builders.killed`."""
        arguments = ["watch", self.inbox, "--detector", self.detector, "--out", self.out]
        arguments += ["--settle", settle, *options]
        program = ["-m", "anomaly_detection"]
        if killed_at:
            program = [str(Path(__file__).with_name("killed.py")), *map(str, killed_at)]
        self.said = (self.folder / "said.txt").open("a")
        self.process = subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
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
