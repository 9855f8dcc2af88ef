"""What a trainer says: of an epoch, of a loss that is not finite, of a device without memory."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anomaly_detection.errors import TrainingError
from anomaly_detection.progress import pace


def epoch_in_words(trainer: Any, seconds: float) -> str:
    """Losses and speed of the epoch that took so long, and how long the others will take."""
    row, total = trainer.history[-1], trainer.num_epochs
    losses = [f"train loss {row['train_loss']:#.4g}"]
    if "val_loss" in row:
        losses.append(f"validation loss {row['val_loss']:#.4g}")
    is_last = trainer.should_stop or len(trainer.history) >= total
    left = None if is_last else (total - len(trainer.history)) * seconds
    speed = pace(trainer.images_per_second, "images", left)
    return f"epoch {row['epoch']}/{total}: {', '.join([*losses, speed])}"


def finite(losses: list[Tensor], epoch: int, first: int = 0) -> list[float]:
    """The losses of consecutive batches as floats.

    Raises:
        TrainingError: One is not finite.
    """
    values = torch.stack(losses).tolist() if losses else []
    for batch_idx, value in enumerate(values, start=first):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss must be finite, got {value} in epoch {epoch + 1}, batch {batch_idx}; "
                "the last good checkpoint is kept. Lower the learning rate, or use float32."
            )
    return values


@contextlib.contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Turn PyTorch's error into one that names the parameters that help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the device's memory is too small ({str(error).splitlines()[0]}); lower "
            "training.batch_size (and raise training.accumulate_batches to make up for it), set "
            "training.gradient_checkpointing, a training.precision of 16 bits, or a smaller "
            "data.image_size."
        ) from None
