"""Batches of a data set."""

import os
import random
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from anomaly_detection.errors import DataError


def create_dataloader(
    dataset: Dataset,
    batch_size: int = 32,
    shuffle: bool = False,
    num_workers: int = 0,
    *,
    seed: int = 0,
) -> DataLoader:
    """Batches in the data set's order, or reshuffled every epoch.

    The order depends on `seed` and the epoch alone (the trainer calls `sampler.set_epoch`), not
    on workers or an interruption.

    Under torchrun, each process gets its share of every batch. When shuffling, all get equally
    many images, so the first few may come twice; in order, every image comes once.

    Raises:
        DataError: `batch_size` is not a multiple of the number of processes.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % world_size:
        raise DataError(
            f"batch_size must be a multiple of the {world_size} processes, got {batch_size}."
        )
    sampler: DistributedSampler | range
    if shuffle:
        # The sampler adds seed and epoch: keep seed 0's second epoch apart from seed 1's first.
        far_apart = random.Random(seed).getrandbits(31)
        sampler = DistributedSampler(dataset, world_size, rank, seed=far_apart)
    else:
        num_images = len(dataset)  # type: ignore[arg-type]  # PyTorch's Dataset declares no length
        sampler = range(rank, num_images, world_size)
    return DataLoader(
        dataset,
        batch_size=batch_size // world_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collated,
        persistent_workers=num_workers > 0,
        # A private generator: seeding the workers must not advance the global one.
        generator=torch.Generator().manual_seed(seed),
    )


def _collated(batch: Any) -> Any:
    """A batch of items; one that the data set has made as a whole stays as it is."""
    return default_collate(batch) if isinstance(batch, list) else batch
