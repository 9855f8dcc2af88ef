"""What runs on the cluster's nodes: Ray and the standard library are all that it imports."""

import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray

Files = dict[str, bytes]  # contents by path

ENDED = {"lost": "the job was killed"}  # what is known of a job that has not said why it ends

ANSWER = 2.0  # seconds to wait for an answer to a renewal, and for a lease
RENEW_EVERY = 0.5  # seconds
LEASE = 10.0  # seconds without one until a job ends itself
GRACE = 25.0  # seconds without one until the next attempt may start: longer than an end can take


class Lost(Exception):
    """An attempt that may succeed when it is made again."""


class Board:
    """Where jobs, on any node, leave what the driver and their next attempt should know."""

    def __init__(self) -> None:
        self.saves: dict[str, Files] = {}
        self.leases: dict[str, tuple[str, float]] = {}
        self.lines: list[tuple[str, str, str]] = []
        self.fresh: dict[str, Files] = {}

    def lease(self, job: str, attempt: str) -> bool:
        """Give or renew the lease on a job; False while another attempt may still be running."""
        holder, renewed = self.leases.get(job, (attempt, 0.0))
        if holder != attempt and time.monotonic() - renewed < GRACE:
            return False
        self.leases[job] = (attempt, time.monotonic())
        return True

    def renew(self, job: str, attempt: str) -> bool:
        """Renew the lease; False if the attempt does not hold it."""
        return self._holds(job, attempt) and self.lease(job, attempt)

    def release(self, job: str, attempt: str) -> None:
        """Let the next attempt start at once."""
        if self._holds(job, attempt):
            del self.leases[job]

    def _holds(self, job: str, attempt: str) -> bool:
        """Whether the attempt has the lease."""
        return self.leases.get(job, ("", 0.0))[0] == attempt

    def tell(self, job: str, node: str, line: str) -> None:
        """A job has printed a line."""
        self.lines.append((job, node, line))

    def save(self, job: str, attempt: str, files: Files) -> None:
        """Keep what a job has saved, if the attempt is the one that may run."""
        if self._holds(job, attempt):
            self.saves[job] = self.fresh[job] = files

    def saved(self, job: str) -> Files:
        """What was saved last."""
        return self.saves.get(job, {})

    def news(self) -> tuple[list[tuple[str, str, str]], dict[str, Files]]:
        """The lines, as (job, node, text), and the saves since the last call."""
        news = self.lines, self.fresh
        self.lines, self.fresh = [], {}
        return news


def pack(folder: Path, names: list[str]) -> bytes:
    """An archive of files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for name in names:
            archive.add(folder / name, name, recursive=False)
    return stream.getvalue()


def jobs_folder() -> Path:
    """Where this node's jobs have their folders."""
    return Path(tempfile.gettempdir()) / f"anomaly-detection-{os.getuid()}"


def unpack(code: bytes, name: str) -> Path:
    """A folder of this name with the archive's files, in place of one that a killed job left."""
    folder = jobs_folder() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    with tarfile.open(fileobj=io.BytesIO(code)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def versions(packages: list[str]) -> dict[str, str]:
    """Versions of Python and of packages on this node."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def differences(expected: dict[str, str], node: str) -> list[str]:
    """What has another version on this node, in words."""
    found = versions([name for name in expected if name != "python"])
    return [
        f"node {node} must have {name} {wanted}, as the driver, got {found[name]}"
        for name, wanted in expected.items()
        if found[name] != wanted
    ]


def describe(code: bytes, expected: dict[str, str], gpus: float) -> dict[str, Any]:
    """A node's name, what differs from the driver there, its processor and precision."""
    node = platform.node()
    if wrong := differences(expected, node):
        return {"node": node, "wrong": wrong}
    folder = unpack(code, f"probe-{uuid.uuid4().hex}")
    try:
        command = [sys.executable, "-m", "tools.cluster.node"]
        variables = os.environ | _gpus(gpus)
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        return {"node": node, "wrong": [f"node {node}: {done.stderr.strip()}"]}
    return {"node": node, "wrong": [], **json.loads(done.stdout)}


def work(code: bytes, job: dict[str, Any], board: Any) -> dict[str, str]:
    """Run a job; returns {} or why it has failed for good: {"failed": text}, {"refused": text}.

    In a thread of its own: while a task's main thread waits for Ray, Ray lends its CPUs to others.

    Raises:
        Lost: It may succeed when it is tried again.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_work, code, job, board).result()


def _work(code: bytes, job: dict[str, Any], board: Any) -> dict[str, str]:
    name, node = job["name"], f"{platform.node()} {ray.get_runtime_context().get_node_id()[:6]}"
    if wrong := differences(job["versions"], node):
        return {"refused": "; ".join(wrong)}
    attempt = uuid.uuid4().hex
    while not ray.get(board.lease.remote(name, attempt)):
        time.sleep(ANSWER)
    folder = unpack(code, job["folder"])
    try:
        for path, content in (job["files"] | ray.get(board.saved.remote(name))).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / path).write_bytes(content)
        return _supervised(folder, job, attempt, node, board)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _renewed(board: Any, name: str, attempt: str) -> bool:
    while True:  # the job itself ends if this takes too long
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            return ray.get(board.renew.remote(name, attempt), timeout=ANSWER)


def _gpus(number: float) -> dict[str, str]:
    """Variables by which a job without a GPU sees none: Ray hides only those that it gives away."""
    return {} if number else {"CUDA_VISIBLE_DEVICES": ""}


def _read(folder: Path, paths: list[str]) -> Files:
    """The files that are still there: DVC deletes those of a stage that begins."""
    files = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            files[path] = (folder / path).read_bytes()
    return files


def _supervised(
    folder: Path, job: dict[str, Any], attempt: str, node: str, board: Any
) -> dict[str, str]:
    name, last = job["name"], dict(ENDED)

    def listen(stream: Any) -> None:
        try:
            for text in stream:
                event = json.loads(text)
                if "line" in event:
                    board.tell.remote(name, node, event["line"])
                elif "saved" in event:
                    ray.get(board.save.remote(name, attempt, _read(folder, event["saved"])))
                else:
                    last.clear()
                    last.update(event)
        except Exception as error:
            last.update(lost=f"{type(error).__name__}: {error}")
            process.kill()

    options = ["--lease", str(LEASE), "--save-every", str(job["save_every"])]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.cluster.job", *options, *job["stages"]],
        cwd=folder,
        env=os.environ | job["variables"] | _gpus(job["gpus"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    listener = threading.Thread(target=listen, args=(process.stdout,))
    listener.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            while process.poll() is None and _renewed(board, name, attempt):
                process.stdin.write(b"\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                time.sleep(RENEW_EVERY)
    finally:
        process.kill()  # its stages end with it
    process.wait()
    listener.join()
    if process.returncode >= 0:  # otherwise it was killed, and its stages may still be ending
        board.release.remote(name, attempt)
    if process.returncode == 0 and last == ENDED:
        return {}
    if "failed" in last:
        return last
    raise Lost(last["lost"])
