"""The points in training where other code can run."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Protocol

from torch import Tensor

Batch = Any
Metrics = dict[str, float]


class Loader(Protocol):
    """Batches with a length, iterated once per epoch: a DataLoader or a list."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


class Hooks:
    """Methods that a trainer's subclass or a callback can override; each does nothing by default.

    A hook that raises StopIteration ends training cleanly: the epoch skips its remaining
    training batches, is validated and saved, and `on_fit_end` is called.
    """

    def on_fit_start(self) -> None:
        """Before the first epoch."""

    def on_fit_end(self) -> None:
        """After the last epoch; again if a finished training is resumed."""

    def on_train_epoch_start(self, epoch: int) -> None:
        """Before the first training batch of an epoch; epochs count from 0."""

    def on_train_epoch_end(self, epoch: int, train_loss: float) -> None:
        """After the last training batch, with the mean loss of the epoch's batches."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Before a training step, with the loader's batch; batches count from 0."""

    def on_before_optimizer_step(self) -> None:
        """Between backward and the optimizer's step: the place to clip gradients."""

    def on_train_batch_end(
        self, batch: Batch, batch_idx: int, outputs: dict[str, Any], loss: Tensor
    ) -> None:
        """After the optimizer's step, with the loss; calling its `item()` waits for the GPU."""

    def on_validation_epoch_start(self, epoch: int) -> None:
        """Before the first validation batch."""

    def on_validation_epoch_end(self, epoch: int, val_metrics: Metrics) -> None:
        """After the last validation batch, with what `compute_metrics` returned."""

    def on_validation_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Before a validation step."""

    def on_validation_batch_end(self, batch: Batch, batch_idx: int, outputs: Any) -> None:
        """After a validation step."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in vars(cls):
            if name.startswith("on_") and not hasattr(Hooks, name):
                hooks = [hook for hook in vars(Hooks) if hook.startswith("on_")]
                nearest = get_close_matches(name, hooks, n=1, cutoff=0)[0]
                raise TypeError(f"{cls.__name__}.{name} is not a hook; did you mean {nearest}?")


class Callback(Hooks):
    """Base class of callbacks: override the hooks you need.

    Attributes:
        trainer: The BaseTrainer that calls them.
    """

    trainer: Any

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
