"""Prepared arrays as a data set for PyTorch."""

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from anomaly_detection.data.arrays import PreparedArrays
from anomaly_detection.data.sample import UNKNOWN


class PreparedDataset(PreparedArrays, Dataset):
    """One split of a prepared category, or several.

    Items and batches are dicts like those of `read_sample`: `image` as in images.npy, `label`,
    `mask` uint8 (1, S, S), `defect_type`, `path` (relative to the category) and `sha256`.

    Args:
        folder: What `prepare_category` wrote.
        split: As in `PreparedArrays`.
        device: Where batches are created. All these images are copied to it once, unless it is the
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
            pictures = torch.tensor(self.pictures(), device=self.device)
            self._dtype = pictures.dtype
            # CUDA does not index uint16.
            is_deep = self._dtype == torch.uint16
            self._copy = pictures.view(torch.int16) if is_deep else pictures

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        return {key: values[0] for key, values in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A whole batch at once; a DataLoader calls this if the data set has it."""
        rows = [self.rows[i] for i in indices]
        return {
            "image": self._images(indices),
            "label": self._to_device(torch.tensor([int(row["label"]) for row in rows])),
            "mask": self._masks(indices),
            "defect_type": [row["defect_type"] for row in rows],
            "path": [row["path"] for row in rows],
            "sha256": [row["sha256"] for row in rows],
        }

    def _images(self, indices: Sequence[int]) -> torch.Tensor:
        if self._copy is not None:
            return self._copy[self._to_device(torch.tensor(indices))].view(self._dtype)
        return torch.from_numpy(self.images[[self.positions[i] for i in indices]])

    def _masks(self, indices: Sequence[int]) -> torch.Tensor:
        unmasked = [UNKNOWN if self.rows[i]["label"] == "1" else 0 for i in indices]
        values = self._to_device(torch.tensor(unmasked, dtype=torch.uint8))
        masks = values[:, None, None, None].repeat(1, 1, self.image_size, self.image_size)
        for mask, i in zip(masks, indices, strict=True):
            if (known := self.mask(i)) is not None:
                mask[0] = torch.from_numpy(known.copy())
            if (region := self.region(i)) is not None:
                mask[0, torch.from_numpy(region == 0)] = UNKNOWN
        return masks

    def _to_device(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, non_blocking=True)
