"""Prepared arrays as a data set for PyTorch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from anomaly_detection.data.arrays import PreparedArrays
from anomaly_detection.data.layout import UNKNOWN


class PreparedDataset(PreparedArrays, Dataset):
    """One split of a prepared category.

    Items and batches are dicts like those of `read_sample`: `image` uint8 (3, S, S), `label`,
    `mask` uint8 (1, S, S), `defect_type`, `path` (relative to the category) and `sha256`.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        return {key: values[0] for key, values in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A whole batch at once: what a DataLoader asks a data set for, if it has this method."""
        rows = [self.rows[i] for i in indices]
        return {
            "image": torch.from_numpy(self.images[[row["position"] for row in rows]]),
            "label": torch.tensor([int(row["label"]) for row in rows]),
            "mask": torch.stack([self._mask(i) for i in indices]),
            "defect_type": [row["defect_type"] for row in rows],
            "path": [row["path"] for row in rows],
            "sha256": [row["sha256"] for row in rows],
        }

    def _mask(self, index: int) -> torch.Tensor:
        mask = self.mask(index)
        if mask is not None:
            return torch.from_numpy(mask.copy())[None]
        value = UNKNOWN if self.rows[index]["label"] == "1" else 0
        return torch.full((1, self.image_size, self.image_size), value, dtype=torch.uint8)
