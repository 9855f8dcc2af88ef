"""A category as a few large arrays: written once, then memory-mapped.

They are in two folders, `train` and `test`, so that what is trained does not depend on test images.
Images are in the tiles that a model sees: one, the whole image, unless `tile_size` says otherwise.

images.npy     uint8 or uint16 (T, C, S, S), C being 3 or 4, the tiles of one image after the other;
               where only a part is judged, with one more channel, the last, in which that part is
               255 or 65535
tiles.npy      int32 (T, 2), of each tile the image (row of index.csv) and the number in its grid
masks.npy      uint8 (M, S, S), the tiles of the images that have a mask; absent if there are none
overviews.npy  uint8 (N, 3, s, s), whole images for people; absent where one tile shows the whole
frame.json     how pictures were cut, and their format: the options of a `Frame`
index.csv      one row per image of the folder: path, split, label, defect_type, sha256, height and
               width of what is seen, in pixels, mask (the row of its first tile, or empty)
"""

import csv
import json
import mmap
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_detection.data.frame import Frame
from anomaly_detection.data.overview import overview_of_map
from anomaly_detection.data.tiles import Grid

IMAGES, TILES, MASKS, OVERVIEWS = "images.npy", "tiles.npy", "masks.npy", "overviews.npy"
FRAME, INDEX = "frame.json", "index.csv"
TRAIN, TEST = "train", "test"


def folder_of(split: str) -> str:
    """Which of the two folders has the images of a split."""
    return TEST if split == "test" else TRAIN


def read_index(folder: Path, parts: Sequence[str] = (TRAIN, TEST)) -> list[dict[str, str]]:
    """The rows of a prepared category's index.csv, of both folders or of some."""
    rows: list[dict[str, str]] = []
    for part in parts:
        with (folder / part / INDEX).open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


class PreparedArrays:
    """One split of a prepared category, or several, memory-mapped read-only.

    Args:
        folder: What `prepare_category` wrote.
        split: `fit`, `validation`, `calibration` or `test`; or several of the first three.
        contents: Hashes of the images to have; by default, all of these splits.

    Attributes:
        folder: As above.
        rows: These images' rows of index.csv, in its order, each a dict of strings.
        images: All tiles of the folder that has these splits.
        masks: All masks of that folder; empty if there are none.
        positions: For each tile of these images, its index in `images`.
        owners: For each of these tiles, the index of its image in `rows`, ascending.
        numbers: For each of these tiles, its number in its image's grid.
        frame: How they were cut.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str | Sequence[str],
        contents: Container[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        splits = (split,) if isinstance(split, str) else split
        if len(folders := sorted(set(map(folder_of, splits)))) != 1:
            raise ValueError(f"splits must be of one folder, got {splits!r}, of {folders}.")
        self._arrays = folder = self.folder / folders[0]
        index = read_index(self.folder, folders)
        if unknown := set(splits) - {row["split"] for row in index}:
            raise ValueError(f"split must be one of those in index.csv, got {min(unknown)!r}.")
        self._indices = chosen = [
            i
            for i, row in enumerate(index)
            if row["split"] in splits and (contents is None or row["sha256"] in contents)
        ]
        self.rows = [index[i] for i in chosen]
        self.images: np.ndarray = np.load(folder / IMAGES, mmap_mode="r")
        self.masks: np.ndarray = np.empty((0, self.image_size, self.image_size), np.uint8)
        if (masks := folder / MASKS).exists():
            self.masks = np.load(masks, mmap_mode="r")
        tiles = np.load(folder / TILES)
        owner = np.full(len(index), -1)
        owner[chosen] = np.arange(len(chosen))
        self.positions = np.flatnonzero(owner[tiles[:, 0]] >= 0)
        self.owners, self.numbers = owner[tiles[self.positions, 0]], tiles[self.positions, 1]
        options = json.loads((folder / FRAME).read_text(encoding="utf-8"))
        self.frame, self._options = Frame.from_options(options), options

    @property
    def image_size(self) -> int:
        """Side length of the tiles, in pixels."""
        return self.images.shape[-1]

    @property
    def is_tiled(self) -> bool:
        """Whether an image may have several tiles."""
        return self.frame.tile_size is not None

    def preprocessing(self, bit_depth: int) -> dict[str, Any]:
        """What a detector must do to pictures of `bit_depth` bits to get such tiles."""
        return {"bit_depth": bit_depth, "image_size": self.image_size, **self._options}

    @property
    def side(self) -> int | None:
        """How many of the original's pixels a tile has on its shorter side; None if they differ."""
        if self.frame.tile_size:
            return self.frame.tile_size
        sides = {min(int(row["height"]), int(row["width"])) for row in self.rows}
        return sides.pop() if len(sides) == 1 else None

    @property
    def channels(self) -> int:
        """C: those of the images, without that of the part that is judged."""
        return self.frame.format.channels

    def tiles_of(self, image: int) -> slice:
        """Which of these tiles an image has."""
        first, last = np.searchsorted(self.owners, [image, image + 1])
        return slice(int(first), int(last))

    def tiles(self) -> np.ndarray:
        """All these tiles, as in images.npy: a view if they are consecutive."""
        return _part(self.images, self.positions)

    def pictures(self) -> np.ndarray:
        """These images whole, for people: as `tiles` if one shows the whole, else overviews."""
        if not self.is_tiled:
            return self.tiles()
        return _part(np.load(self._arrays / OVERVIEWS, mmap_mode="r"), self._indices)

    @property
    def aspects(self) -> list[float]:
        """Width / height to show each of the `pictures` with: they are squares, whatever was cut.

        An overview has black bars instead.
        """
        if self.is_tiled:
            return [1.0] * len(self.rows)
        return [int(row["width"]) / int(row["height"]) for row in self.rows]

    def shown(self, values: np.ndarray) -> np.ndarray:
        """A whole image's map or mask as large as its picture among `pictures`."""
        return overview_of_map(values) if self.is_tiled else values

    def grid(self, image: int) -> Grid:
        """Where the tiles lie on an image, at the scale of the tiles."""
        row = self.rows[image]
        return self.frame.grid(int(row["height"]), int(row["width"]), self.image_size)

    def mask(self, image: int) -> np.ndarray | None:
        """The mask of a whole image at the scale of its tiles, uint8 (h, w), if it has one."""
        return self._joined(image, self.tile_mask)

    def region(self, image: int) -> np.ndarray | None:
        """Where a whole image is judged, likewise, 0 elsewhere; None for everywhere."""
        return self._joined(image, self.tile_region)

    def read(self, tiles: Sequence[int] | np.ndarray) -> np.ndarray:
        """A copy of these tiles, as in images.npy."""
        pixels = self.images[self.positions[tiles]]
        mapped: Any = self.images.base
        # The pages read would count as memory in use, which matters where images are large.
        if self.is_tiled and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
        return pixels

    def tile_mask(self, tile: int) -> np.ndarray | None:
        """The mask of a tile, uint8 (S, S), if its image has one."""
        image = self.owners[tile]
        first = self.rows[image]["mask"]
        return self.masks[int(first) + tile - self.tiles_of(image).start] if first else None

    def tile_region(self, tile: int) -> np.ndarray | None:
        """Where a tile is judged, (S, S), 0 elsewhere; None for everywhere."""
        pixels = self.images[self.positions[tile]]
        return pixels[-1] if len(pixels) > self.channels else None

    def _joined(self, image: int, part: Callable[[int], np.ndarray | None]) -> np.ndarray | None:
        tiles = self.tiles_of(image)
        parts = [found for i in range(tiles.start, tiles.stop) if (found := part(i)) is not None]
        return self.grid(image).joined(parts, self.numbers[tiles]) if parts else None


def _part(array: np.ndarray, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """These items, ascending: a view if they are consecutive, else a copy."""
    first, last = indices[0], indices[-1]
    return array[first : last + 1] if last - first == len(indices) - 1 else array[indices]
