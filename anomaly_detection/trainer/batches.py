"""What a trainer does with batches and loaders of any kind."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anomaly_detection.trainer.hooks import Batch, Loader


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device; in dicts, lists and tuples too."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(on_device(value, device) for value in batch)
    return batch


def number_of_images(batch: Batch) -> int:
    """The length of the first tensor in a batch that has one; 0 without any."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    if isinstance(batch, dict):
        batch = list(batch.values())
    parts = batch if isinstance(batch, (list, tuple)) else []
    return next((count for part in parts if (count := number_of_images(part))), 0)


def set_epoch(loader: Loader, epoch: int) -> None:
    """Make a loader that shuffles use that epoch's order."""
    sampler: Any = getattr(loader, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


class Repeated:
    """A loader whose epoch is several of another one's, each in an order of its own.

    Args:
        loader: The other one.
        times: How many.
    """

    def __init__(self, loader: Loader, times: int) -> None:
        self.loader, self.times, self.epoch = loader, times, 1
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, as in `set_epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.times * len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        first = 1 + (self.epoch - 1) * self.times
        for epoch in range(first, first + self.times):
            set_epoch(self.loader, epoch)
            yield from self.loader


def means(outputs: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each value that all steps returned, over all its elements.

    A short last batch gets no extra weight if values are given for each image.
    """
    return {
        key: torch.cat([torch.as_tensor(row[key]).detach().cpu().flatten() for row in outputs])
        .double()
        .mean()
        .item()
        for key in outputs[0]
    }
