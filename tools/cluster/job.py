"""Run one category's stages in a folder of its own, and save as they go.

python -m tools.cluster.job --lease SECONDS --save-every SECONDS STAGE...

The folder has the code, a params.yaml and a dvc.lock cut down to the category, and DVC's settings.
What else it needs comes from the DVC remote, and what it makes goes there. Lines of JSON on
standard output say what happens: {"line": text}, {"saved": [path, ...]}, and one of
{"failed": text} and {"lost": text} if it ends without success.

It ends when nobody has written to its standard input for as long as the lease, and its stages end
with it, by a lock that it holds. So however a node, its scheduler or this process ends, nothing
trains on beside the next attempt.
"""

import argparse
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from anomaly_detection.errors import UserError
from stages import LEASE, TIMES, run
from tools.cluster.dvc import COMMAND, environment, failure, insist
from tools.cluster.dvcfiles import cut_lock, parse_lock

STATES = Path(".states")  # a DVC repository of its own, for the states of trainings
ARCHIVE, STATE = STATES / "work.tar", STATES / "work.tar.dvc"
LEASED = [sys.executable, "-m", "tools.cluster.leased_dvc", "--wait-for-lock"]
STAGE_FAILED = re.compile(r"failed to run: .*, exited with (-?\d+)")
LINES = 5  # the last ones of a stage that fails say why


class Failed(Exception):
    """A stage has failed, or the remote again and again: another attempt would as well."""


class Lost(Exception):
    """A stage was killed: another attempt may succeed."""


def main(*arguments: str) -> None:
    """Run those of the stages that are stale; exits with 1 if one does not succeed."""
    parser = argparse.ArgumentParser(prog="python -m tools.cluster.job", description=__doc__)
    parser.add_argument("--lease", type=float, required=True)
    parser.add_argument("--save-every", type=float, required=True)
    parser.add_argument("stages", nargs="+")
    options = parser.parse_args(arguments)
    # Not in the folder, which does not outlive this process, and not that of the attempt before.
    lease = Path(f"{Path.cwd()}.{os.getpid()}.lease")
    with FileLock(lease):
        threading.Thread(target=end_without, args=(options.lease,), daemon=True).start()
        try:
            Job(options.stages, environment() | {LEASE: str(lease)}).run(options.save_every)
        except Failed as error:
            tell(failed=str(error))
            sys.exit(1)
        except Lost as error:
            tell(lost=str(error))
            sys.exit(1)
        finally:
            lease.unlink(missing_ok=True)


def tell(**event: str | list[str]) -> None:
    """Write an event to standard output."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def end_without(seconds: float) -> None:
    """Kill this process when standard input has been silent for so long, or has ended."""
    while select.select([0], [], [], seconds)[0] and os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


class Job:
    """The stages of a category, in the current folder.

    Args:
        stages: Their names, in order.
        variables: The environment in which they run.
    """

    def __init__(self, stages: Sequence[str], variables: dict[str, str]) -> None:
        self.stages = stages
        self.variables = variables
        self.saved: object = None

    def run(self, save_every: float) -> None:
        """Run what is stale, from the state of an interrupted training if there is one.

        Raises:
            Failed: A stage has failed, or the remote again and again.
            Lost: A stage was killed.
        """
        if STATE.is_file():
            with contextlib.suppress(Failed):  # it may have been deleted from the remote since
                self.dvc("pull", at=STATES)
                with tarfile.open(ARCHIVE) as states:
                    states.extractall(filter="data")
        try:
            with repeatedly(self.save, save_every):
                persist(self.repro)
        except (Failed, Lost):
            with contextlib.suppress(Failed):
                self.save()
            raise
        self.save()

    def repro(self) -> str | None:
        """Run DVC; returns why it should run again, None if all stages are up to date."""
        options = ("--single-item", "--pull", "--allow-missing", "--no-run-cache")
        with subprocess.Popen(
            [*LEASED, "repro", *options, *self.stages],
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            said = []
            for line in process.stdout or ():
                if line := line.rstrip():
                    said.append(line)
                    tell(line=line)
        if process.returncode == 0:
            return None
        if not (failure := STAGE_FAILED.search(said[-1] if said else "")):
            return said[-1] if said else "DVC was killed"
        code = int(failure[1])
        begun = max((i for i, line in enumerate(said) if line.startswith("> ")), default=-1)
        reason = "\n".join(said[begun + 1 : -1][-LINES:]) or said[-1]
        raise Lost(said[-1]) if code < 0 or code > 128 else Failed(reason)

    def save(self) -> None:
        """Push what has finished and the state of a training, then tell which files say so.

        DVC rewrites dvc.lock in place, so one that changes meanwhile is left for the next time.
        """
        lock = Path("dvc.lock")
        before = lock.read_bytes() if lock.is_file() else b""
        try:
            states = {path: path.stat().st_mtime_ns for path in _states()}
            if (before, states) == self.saved:
                return
            archive(states)
        except FileNotFoundError:  # a file was deleted meanwhile
            states = {}
        if states:
            self.dvc("add", ARCHIVE.name, at=STATES)
            self.dvc("push", at=STATES)
        try:
            finished = list(cut_lock(parse_lock(before.decode()), self.stages))
        except UserError:  # DVC is writing it
            return
        if finished:
            self.dvc("push", *finished)
        if finished and lock.read_bytes() == before:
            self.saved = before, states
            files = [lock, *_files(Path("metrics")), *_files(TIMES), *([STATE] if states else [])]
            tell(saved=[path.as_posix() for path in files])

    def dvc(self, *arguments: str, at: Path = Path()) -> None:
        """Run DVC, again and again if it fails.

        Raises:
            Failed: It has failed each time.
        """
        command = [*COMMAND, *arguments]
        persist(lambda: failure(subprocess.run(command, cwd=at, capture_output=True, text=True)))


def archive(files: Iterable[Path]) -> None:
    """Archive files with their times: DVC keeps none, and they tell how long a training took."""
    ARCHIVE.unlink(missing_ok=True)  # it may be a link into DVC's cache
    with tarfile.open(ARCHIVE, "w") as target:
        for file in files:
            target.add(file)


def persist(action: Callable[[], str | None]) -> None:
    """Insist on an action, and tell of each delay.

    Raises:
        Failed: It has never returned None.
    """

    def pause(delay: float, reason: str) -> None:
        tell(line=f"again in {delay} s: {reason}")
        time.sleep(delay)

    if reason := insist(action, pause):
        raise Failed(reason)


@contextlib.contextmanager
def repeatedly(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Do something every so often beside the block; what fails then is left for the next time."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            with contextlib.suppress(Failed):
                action()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _states() -> list[Path]:
    """The files of trainings' states."""
    return [file for folder in Path(".work").glob("*") for file in _files(folder)]


def _files(folder: Path) -> list[Path]:
    return sorted(x for x in folder.rglob("*") if x.is_file() and not x.name.startswith("."))


if __name__ == "__main__":
    run(main)
