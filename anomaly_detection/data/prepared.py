"""Prepared arrays as a data set for PyTorch."""

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from anomaly_detection.data.arrays import PreparedArrays
from anomaly_detection.data.sample import UNKNOWN


class PreparedDataset(PreparedArrays, Dataset):
    """The tiles of one split of a prepared category, or several: whole images, if not tiled.

    Items and batches are dicts like those of `read_sample`: `image` as in images.npy, `label`,
    `mask` uint8 (1, S, S), `defect_type`, `path` (relative to the category; of a tile with its
    number, as in `good/1.png#7`), `sha256`, and `position`, a tile's number. Label, defect type and
    hash are those of the image.

    Args:
        folder: What `prepare_category` wrote.
        split: As in `PreparedArrays`.
        device: Where batches are created. All these tiles are copied to it once, unless it is the
            CPU: then they stay on disk.
        contents: As in `PreparedArrays`.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str | Sequence[str],
        device: str | torch.device = "cpu",
        contents: Container[str] | None = None,
    ) -> None:
        super().__init__(folder, split, contents)
        self.device = torch.device(device)
        self._copy: torch.Tensor | None = None
        if self.device.type != "cpu":
            tiles = torch.tensor(self.tiles(), device=self.device)
            self._dtype = tiles.dtype
            # CUDA does not index uint16.
            self._copy = tiles.view(torch.int16) if self._dtype == torch.uint16 else tiles

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        return {key: values[0] for key, values in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A whole batch at once; a DataLoader calls this if the data set has it."""
        rows = [self.rows[self.owners[i]] for i in indices]
        positions = torch.from_numpy(self.numbers[indices]).long()
        return {
            "position": self._to_device(positions),
            "image": self._images(indices),
            "label": self._to_device(torch.tensor([int(row["label"]) for row in rows])),
            "mask": self._to_device(self._masks(indices)),
            "defect_type": [row["defect_type"] for row in rows],
            "path": [self._name(i) for i in indices],
            "sha256": [row["sha256"] for row in rows],
        }

    def whole(self, image: int) -> dict[str, Any]:
        """A batch with one whole image: as above, at the scale of its tiles, without the pixels."""
        row, grid = self.rows[image], self.grid(image)
        truth = np.empty((1, 1, grid.height, grid.width), np.uint8)
        write_truth(truth[0, 0], row, self.mask(image), self.region(image))
        return {
            "label": torch.tensor([int(row["label"])]),
            "mask": torch.from_numpy(truth),
            "defect_type": [row["defect_type"]],
            "path": [row["path"]],
            "sha256": [row["sha256"]],
        }

    def _images(self, indices: Sequence[int]) -> torch.Tensor:
        if self._copy is not None:
            return self._copy[self._to_device(torch.tensor(indices))].view(self._dtype)
        return torch.from_numpy(self.read(indices))

    def _masks(self, tiles: Sequence[int]) -> torch.Tensor:
        truth = np.empty((len(tiles), 1, self.image_size, self.image_size), np.uint8)
        for own, i in zip(truth[:, 0], tiles, strict=True):
            write_truth(own, self.rows[self.owners[i]], self.tile_mask(i), self.tile_region(i))
        return torch.from_numpy(truth)

    def _name(self, tile: int) -> str:
        path = self.rows[self.owners[tile]]["path"]
        return f"{path}#{self.numbers[tile]}" if self.is_tiled else path

    def _to_device(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, non_blocking=True)


def write_truth(
    truth: np.ndarray,
    row: Mapping[str, str],
    mask: np.ndarray | None,
    region: np.ndarray | None,
) -> None:
    """Write what is known of an image's pixels: 0 normal, 1 anomalous, or UNKNOWN.

    Args:
        truth: uint8 (H, W), to write to.
        row: Of index.csv.
        mask: The image's mask (H, W), if it has one.
        region: 0 where it is not judged, (H, W); None for nowhere.
    """
    truth[:] = (UNKNOWN if row["label"] == "1" else 0) if mask is None else mask
    if region is not None:
        truth[region == 0] = UNKNOWN
