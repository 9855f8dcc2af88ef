"""Resume an interrupted training where it stopped, and only that exact training."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from anomaly_detection.errors import TrainingError
from anomaly_detection.files import write_text
from anomaly_detection.trainer.processes import rank

MAX_AGE = 30 * 24 * 3600  # seconds that the state of an interrupted training is kept


def latest_checkpoint(folder: Path) -> Path | None:
    """The `epoch_N.pth` with the highest N, or None."""
    return max(folder.glob("epoch_*.pth"), key=_epoch, default=None)


def _epoch(path: Path) -> int:
    return int(path.stem.removeprefix("epoch_"))


@contextlib.contextmanager
def resumable(category: str, key: str, root: Path) -> Iterator[Path]:
    """A folder for the state of one training, `<root>/.work/<category>-<key>`.

    It is deleted when the block completes, and kept if the block fails or the process is killed:
    until the same training completes, or for 30 days after its last change.

    Meanwhile, the first of the processes that train the model holds two locks: one on this
    training, and one on the category in the working directory, whose results it will replace.

    Raises:
        TrainingError: Another process holds one of the locks.
    """
    work, name = root / ".work", f"{category}-{key}"
    state = work / name
    if rank() > 0:
        yield state
        return
    here = Path(".work") / f"{category}.lock"
    with _exclusive(here, category), _exclusive(work / f"{name}.lock", category):
        _begin(state)
        yield state
        shutil.rmtree(state, ignore_errors=True)
    _drop_old(work)


def seconds_before(state: Path) -> float:
    """How long interrupted attempts at the same training took for what they have left."""
    note = state / "seconds.txt"
    return float(note.read_text()) if note.exists() else 0.0


def _begin(state: Path) -> None:
    """Write `seconds_before`; when the file was written is when the attempt began.

    An attempt may end without a chance to write anything, so its time is that of its last
    checkpoint.
    """
    note, seconds = state / "seconds.txt", seconds_before(state)
    if note.exists():
        saved = [path.stat().st_mtime for path in state.rglob("*.pth")]
        seconds += max([0.0, *(end - note.stat().st_mtime for end in saved)])
    write_text(note, f"{seconds:.2f}\n")


def _drop_old(work: Path) -> None:
    """Delete the states and the locks of trainings that nobody has resumed for long."""
    for path in list(work.iterdir()):
        with contextlib.suppress(OSError, TrainingError):  # in use, or another process was faster
            last = max(x.stat().st_mtime for x in (path, *path.rglob("*")))
            if time.time() - last < MAX_AGE:
                continue
            if path.is_dir():
                with _exclusive(work / f"{path.name}.lock", path.name):
                    shutil.rmtree(path)
            elif path.suffix == ".lock":
                with _exclusive(path, path.stem):
                    pass


@contextlib.contextmanager
def _exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, which the system releases however the process ends, and delete it.

    Raises:
        TrainingError: Another process holds it, such as a trainer that outlived a killed `dvc`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder, lock = path.with_suffix(".pid"), FileLock(path, timeout=0)
    # Two processes must not hold a deleted file and a new one of its name: while one has this lock,
    # which stays, no other opens or deletes any.
    guard = FileLock(path.with_name("guard"))
    with guard:
        try:
            lock.acquire()
        except Timeout:
            pid = holder.read_text() if holder.exists() else "unknown"
            raise TrainingError(
                f"{what} must not be trained twice at once, but process {pid} is at it; "
                f"wait until it ends, or end it: kill {pid}."
            ) from None
        holder.write_text(str(os.getpid()))
    try:
        yield
    finally:
        with guard:
            holder.unlink(missing_ok=True)
            lock.release()
            path.unlink(missing_ok=True)
