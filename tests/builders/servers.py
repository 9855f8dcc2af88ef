"""A server in a process of its own."""

import http.client
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from typing_extensions import Self

from builders import detectors
from builders.detectors import pictures as textures
from builders.projects import ROOT, environment

KIND = {"Content-Type": "image/png"}


def as_png(pixels: np.ndarray) -> bytes:
    """The file of a picture (C, H, W)."""
    file = io.BytesIO()
    Image.fromarray(np.moveaxis(pixels, 0, -1)).save(file, "PNG")
    return file.getvalue()


def pictures(count: int, seed: int = 5) -> list[bytes]:
    return [as_png(x) for x in textures(count, seed)]


def write_export(folder: Path, category: str = "part", seed: int = 0) -> Path:
    """A detector; another seed has other scores and another fingerprint."""
    parameters = {"model": {"name": "patchcore"}}
    return detectors.write_export(
        folder, seed, parameters=parameters, provenance={"category": category}
    )


def described(export: Path, folder: Path, **changes: object) -> Path:
    """A copy of an export with another description."""
    shutil.copytree(export, folder)
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def of_category(export: Path, folder: Path, category: str) -> Path:
    """A copy of an export for another category."""
    return described(export, folder, provenance={"category": category})


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def json(self):
        return json.loads(self.content)


class Server:
    """`anomaly-detection serve` on a free port, until the block ends; `stderr` is what it said."""

    def __init__(self, folder: Path, *arguments: object, **options) -> None:
        self.log = folder / "stderr.txt"
        command = [sys.executable, "-m", "anomaly_detection", "serve", "--port", "0", "--detector"]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=environment(OMP_NUM_THREADS="1", TMPDIR=str(folder)),
            cwd=ROOT,
            **options,
        )
        self.line = self.process.stdout.readline().strip()
        assert self.line.startswith("Serving"), self.stderr
        self.port = int(self.line.rpartition(":")[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def stderr(self) -> str:
        return self.log.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body=None, headers=None) -> Answer:
        return ask(self.connect(), method, path, body, headers)

    def get(self, path: str, headers=None):
        answer = self.ask("GET", path, headers=headers)
        assert answer.status == 200, answer
        return answer.json

    def predict(self, content: bytes, query: str = "") -> Answer:
        return self.ask("POST", f"/predict{query}", content, KIND)

    def judge(self, content: bytes, **query: str) -> dict:
        """The row of an image."""
        answer = self.predict(content, f"?{urlencode(query)}" if query else "")
        assert answer.status == 200, answer
        return answer.json

    def label(self, row: dict, **values: object) -> Answer:
        """Send an inspector's label for a row."""
        headers = {"Content-Type": "application/json"}
        return self.ask("POST", f"/verdicts/{row['id']}/label", json.dumps(values), headers)

    def metric(self, name: str, **labels: str) -> float | None:
        """The sum of a metric's values that have these labels."""
        text = self.ask("GET", "/metrics").content.decode()
        samples = [x for family in text_string_to_metric_families(text) for x in family.samples]
        found = [
            x.value
            for x in samples
            if x.name == f"anomaly_detection_{name}" and labels.items() <= x.labels.items()
        ]
        return sum(found) if found else None

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait()


def ask(connection, method: str, path: str, body=None, headers=None) -> Answer:
    connection.request(method, path, body, headers or {})
    found = connection.getresponse()
    return Answer(found.status, found.headers, found.read())


def form(content: bytes, filename: str = "a.png", field: str = "file") -> tuple[bytes, dict]:
    """The body and headers of a multipart form with a file."""
    head = f'--xyz\r\nContent-Disposition: form-data; name="{field}"; filename="{filename}"\r\n\r\n'
    body = head.encode() + content + b"\r\n--xyz--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=xyz"}
