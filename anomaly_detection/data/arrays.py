"""A category as a few large arrays: written once, then memory-mapped.

images.npy  uint8 or uint16 (N, C, S, S), C being 3 or 4; where only a part is judged, with one more
            channel, the last, in which that part is 255 or 65535
masks.npy   uint8 (M, S, S), the existing masks; absent if there are none
frame.json  how pictures were cut, and their format: the options of a `Frame`
index.csv   one row per image: path, split, label, defect_type, sha256, mask (row or empty)
"""

import csv
import json
from collections.abc import Container, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_detection.data.format import Format

FRAME = "frame.json"


def read_index(folder: Path) -> list[dict[str, str]]:
    """The rows of a prepared category's index.csv."""
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class PreparedArrays:
    """One split of a prepared category, or several, memory-mapped read-only.

    Args:
        folder: What `prepare_category` wrote.
        split: `fit`, `validation`, `calibration` or `test`, or several of them.
        contents: Hashes of the images to have; by default, all of these splits.

    Attributes:
        folder: As above.
        rows: These images' rows of index.csv, in its order, each a dict of strings.
        positions: For each row, the index of its image in `images`.
        images: The images of the whole category.
        masks: The masks of the whole category; empty if there are none.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str | Sequence[str],
        contents: Container[str] | None = None,
    ) -> None:
        self.folder = folder = Path(folder)
        index = read_index(folder)
        splits = (split,) if isinstance(split, str) else split
        if unknown := set(splits) - {row["split"] for row in index}:
            raise ValueError(f"split must be one of those in index.csv, got {min(unknown)!r}.")
        self.positions = [
            i
            for i, row in enumerate(index)
            if row["split"] in splits and (contents is None or row["sha256"] in contents)
        ]
        self.rows = [index[i] for i in self.positions]
        self.images: np.ndarray = np.load(folder / "images.npy", mmap_mode="r")
        self.masks: np.ndarray = np.empty((0, self.image_size, self.image_size), np.uint8)
        if (masks := folder / "masks.npy").exists():
            self.masks = np.load(masks, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_size(self) -> int:
        """Side length of the square images, in pixels."""
        return self.images.shape[-1]

    @cached_property
    def frame(self) -> dict[str, Any]:
        """The options of the `Frame` that cut the images."""
        return json.loads((self.folder / FRAME).read_text(encoding="utf-8"))

    @property
    def channels(self) -> int:
        """C: those of the images, without that of the part that is judged."""
        return Format.from_options(self.frame).channels

    def preprocessing(self, bit_depth: int) -> dict[str, Any]:
        """What a detector must do to pictures of `bit_depth` bits to get such images."""
        return {"bit_depth": bit_depth, "image_size": self.image_size, **self.frame}

    def pictures(self) -> np.ndarray:
        """All these images, as in images.npy: a view if they are consecutive."""
        first, last = self.positions[0], self.positions[-1]
        if last - first == len(self.positions) - 1:
            return self.images[first : last + 1]
        return self.images[self.positions]

    def region(self, index: int) -> np.ndarray | None:
        """Where an image is judged, (S, S), 0 elsewhere; None for everywhere."""
        image = self.images[self.positions[index]]
        return image[-1] if len(image) > self.channels else None

    def mask(self, index: int) -> np.ndarray | None:
        """The mask of an image, uint8 (S, S), if it has one."""
        row = self.rows[index]["mask"]
        return self.masks[int(row)] if row else None
