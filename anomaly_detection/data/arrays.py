"""A category as a few large arrays: written once, then memory-mapped.

images.npy  uint8 (N, 3, S, S)
masks.npy   uint8 (M, S, S), the masks that exist; absent when there are none
index.csv   a row for each image: path, split, label, defect_type, sha256, mask (row or empty)
"""

import csv
from pathlib import Path

import numpy as np


def read_index(folder: Path) -> list[dict[str, str]]:
    """The rows of a prepared category's index.csv."""
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class PreparedArrays:
    """One split of a prepared category, memory-mapped read-only.

    Args:
        folder: What `prepare_category` wrote.
        split: `fit`, `validation`, `calibration` or `test`.

    Attributes:
        rows: Of index.csv, each a dict of texts, with `position`, the row in `images`.
        images: Of all splits.
        masks: Of all splits, or None.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        folder = Path(folder)
        index = read_index(folder)
        if split not in {row["split"] for row in index}:
            raise ValueError(f"split must be one of those in index.csv, got {split!r}.")
        self.rows = [{**row, "position": i} for i, row in enumerate(index) if row["split"] == split]
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        masks = folder / "masks.npy"
        self.masks = np.load(masks, mmap_mode="r") if masks.exists() else None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.images.shape[-1]

    def pictures(self) -> np.ndarray:
        """All images of the split, uint8 (N, 3, S, S): a view where they are one behind another."""
        positions = [row["position"] for row in self.rows]
        if positions[-1] - positions[0] == len(positions) - 1:
            return self.images[positions[0] : positions[-1] + 1]
        return self.images[positions]

    def mask(self, index: int) -> np.ndarray | None:
        """The mask of an image, uint8 (S, S), if it has one."""
        row = self.rows[index]["mask"]
        return self.masks[int(row)] if row else None
