"""Feature maps of unchanging images, computed once and then read from disk."""

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from anomaly_detection.errors import TrainingError

Features = dict[str, Tensor]


class FeatureCache:
    """Features by image name, returned as they were added: same values, same dtype.

    They are in one unnamed file, so that nothing is left behind however the process ends. It is
    read, not memory-mapped, so that it does not count as the process's memory.

    Args:
        folder: Where to put the file; None for the system's temporary folder.
        num_images: How many images are expected.
        max_bytes: If their features take more than this, the cache stays empty.
    """

    def __init__(self, folder: Path | None, num_images: int, max_bytes: float) -> None:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, as long-lived as the cache
        self._num_images, self._max_bytes = num_images, max_bytes
        self._records: dict[str, int] = {}  # the number of each image's record in the file
        self._shapes: dict[str, tuple[int, ...]] = {}  # (H, W, C) of each level
        self._dtype = torch.float32

    def get(self, names: list[str]) -> Features | None:
        """The features (N, C, H, W) of the images, or None if any are missing."""
        if not all(name in self._records for name in names):
            return None
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        records = torch.empty(len(names), sum(sizes), dtype=self._dtype)
        for name, record in zip(names, records.view(torch.uint8).numpy(), strict=True):
            self._file.seek(self._records[name] * record.nbytes)
            self._file.readinto(record)
        levels = zip(self._shapes.items(), records.split(sizes, dim=1), strict=True)
        return {name: part.unflatten(1, shape).movedim(3, 1) for (name, shape), part in levels}

    def add(self, names: list[str], features: Features) -> None:
        """Keep the features of these images.

        Raises:
            TrainingError: The disk is full.
        """
        levels = {name: maps.movedim(1, 3) for name, maps in features.items()}
        records = torch.cat([maps.flatten(1) for maps in levels.values()], dim=1)
        if records[0].nbytes * self._num_images > self._max_bytes:
            return
        self._shapes = {name: tuple(maps.shape[1:]) for name, maps in levels.items()}
        self._dtype = records.dtype
        try:
            end = self._file.seek(0, os.SEEK_END)
            self._file.write(records.view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                "the teacher's features must have room on the disk, up to "
                f"{self._max_bytes / 1e9:g} GB ({error.strerror}); free some, or set "
                "hardware.feature_cache to 0."
            ) from None
        first = end // records[0].nbytes
        self._records |= {name: first + i for i, name in enumerate(names)}
