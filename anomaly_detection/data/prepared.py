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
            "mask": self._to_device(torch.stack([self._mask(i) for i in indices])),
            "defect_type": [row["defect_type"] for row in rows],
            "path": [self._name(i) for i in indices],
            "sha256": [row["sha256"] for row in rows],
        }

    def whole(self, image: int) -> dict[str, Any]:
        """A batch with one whole image: as above, at the scale of its tiles, without the pixels."""
        row, grid = self.rows[image], self.grid(image)
        mask = ground_truth(row, (grid.height, grid.width), self.mask(image), self.region(image))
        return {
            "label": torch.tensor([int(row["label"])]),
            "mask": mask[None],
            "defect_type": [row["defect_type"]],
            "path": [row["path"]],
            "sha256": [row["sha256"]],
        }

    def _images(self, indices: Sequence[int]) -> torch.Tensor:
        if self._copy is not None:
            return self._copy[self._to_device(torch.tensor(indices))].view(self._dtype)
        return torch.from_numpy(self.read(indices))

    def _mask(self, tile: int) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        row = self.rows[self.owners[tile]]
        return ground_truth(row, size, self.tile_mask(tile), self.tile_region(tile))

    def _name(self, tile: int) -> str:
        path = self.rows[self.owners[tile]]["path"]
        return f"{path}#{self.numbers[tile]}" if self.is_tiled else path

    def _to_device(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, non_blocking=True)


def ground_truth(
    row: Mapping[str, str],
    size: tuple[int, int],
    mask: np.ndarray | None,
    region: np.ndarray | None,
) -> torch.Tensor:
    """What is known of an image's pixels, uint8 (1, H, W): 0 normal, 1 anomalous, or UNKNOWN.

    Args:
        row: Of index.csv.
        size: H and W.
        mask: Its mask (H, W), if it has one.
        region: 0 where it is not judged, (H, W); None for nowhere.
    """
    if mask is None:
        mask = np.full(size, UNKNOWN if row["label"] == "1" else 0, np.uint8)
    known = torch.from_numpy(mask.copy())
    if region is not None:
        known[torch.from_numpy(region == 0)] = UNKNOWN
    return known[None]
