"""Checkpoints: which to keep, and how they are written."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anomaly_detection.errors import TrainingError
from anomaly_detection.files import replacing


@dataclass(frozen=True)
class ModelCheckpoint:
    """Which checkpoints a training run keeps.

    Args:
        best: Keep the one with the best validation metrics, as `best_model.pth`.
        last: How many of the newest to keep as `epoch_N.pth`; None, the default, keeps all.
        every: Also keep every n-th epoch's.
    """

    best: bool = True
    last: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if (self.last is not None and self.last < 0) or (self.every is not None and self.every < 1):
            raise ValueError(
                "last must be at least 0 and every at least 1, or None, "
                f"got {self.last} and {self.every}."
            )

    def keeps(self, epoch: int, newest: int) -> bool:
        """Whether `epoch_<epoch>.pth` is kept once `newest` has been written; both count from 0."""
        is_recent = self.last is None or newest - epoch < self.last
        return is_recent or (self.every is not None and (epoch + 1) % self.every == 0)


def make_folder(path: Path) -> None:
    """Make a folder for checkpoints, if there is none.

    Raises:
        TrainingError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{path} must be a folder for checkpoints: {error.strerror}.") from None


def save_atomically(content: Any, path: Path) -> None:
    """`torch.save` to a temporary file that then replaces `path`; same content gives same bytes.

    Raises:
        TrainingError: The file cannot be written; any previous file is intact.
    """
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            torch.save(_canonical(content), file)  # a path's name would end up in the file
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        if isinstance(error.__context__, KeyboardInterrupt):  # torch's writer hides it
            raise error.__context__ from None
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise TrainingError(f"{path} must be writable: {reason}.") from None


def _canonical(content: Any) -> Any:
    """The same content with equal strings made identical.

    A pickle refers back to objects it has already seen. After a resume, equal strings are
    distinct objects, so the same content would give different bytes.
    """
    if isinstance(content, str):
        return sys.intern(str(content))
    if isinstance(content, dict):
        return {_canonical(key): _canonical(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(map(_canonical, content))
    return content
