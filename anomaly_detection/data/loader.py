"""Batches of a data set."""

from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler


def create_dataloader(
    dataset: Dataset,
    batch_size: int = 32,
    *,
    shuffle: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> DataLoader:
    """Batches in the data set's order, or shuffled anew in each epoch.

    The order is a function of `seed` and of the epoch alone (the trainer calls
    `sampler.set_epoch`), so that it does not depend on workers or on an interruption.
    """
    whole_batches = hasattr(dataset, "__getitems__")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=DistributedSampler(dataset, 1, 0, shuffle=shuffle, seed=seed),
        num_workers=num_workers,
        collate_fn=_as_it_is if whole_batches else None,
        persistent_workers=num_workers > 0,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
