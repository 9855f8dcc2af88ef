"""Resume an interrupted training where it stopped, and only that exact training."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from anomaly_detection.errors import TrainingError
from anomaly_detection.trainer.devices import rank


def latest_checkpoint(folder: Path) -> Path | None:
    """The `epoch_N.pth` with the highest N, or None."""
    return max(folder.glob("epoch_*.pth"), key=_epoch, default=None)


def _epoch(path: Path) -> int:
    return int(path.stem.removeprefix("epoch_"))


@contextlib.contextmanager
def resumable(category: str, key: str, root: Path) -> Iterator[Path]:
    """A folder for the state of one training, `<root>/.work/<category>-<key>`.

    It is deleted when the block completes, and kept if the block fails or the process is killed.
    Meanwhile, the first of the processes that train the model holds two locks: one on this
    training, and one on the category in the working directory, whose results it will replace.

    Raises:
        TrainingError: Another process holds one of the locks.
    """
    state = root / ".work" / f"{category}-{key}"
    if rank() > 0:
        yield state
        return
    here = Path(".work") / f"{category}.lock"
    with _exclusive(here, category), _exclusive(state / "training.lock", category):
        yield state
        shutil.rmtree(state, ignore_errors=True)


@contextlib.contextmanager
def _exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, which the system releases however the process ends.

    Raises:
        TrainingError: Another process holds it, such as a trainer that outlived a killed `dvc`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_suffix(".pid")
    try:
        with FileLock(path, timeout=0):
            holder.write_text(str(os.getpid()))
            yield
    except Timeout:
        pid = holder.read_text() if holder.exists() else "unknown"
        raise TrainingError(
            f"{what} must not be trained twice at once, but process {pid} is at it; "
            f"wait until it ends, or end it: kill {pid}."
        ) from None
