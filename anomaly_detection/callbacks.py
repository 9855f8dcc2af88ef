"""Objects that act at a trainer's hooks."""

from typing import Literal

from anomaly_detection.trainer import BaseTrainer, Hooks, Metrics


class Callback(Hooks):
    """Base of all callbacks: override the hooks that are needed."""

    trainer: BaseTrainer


class EarlyStopping(Callback):
    """End training when a validation metric has not improved for `patience` epochs.

    Args:
        patience: Epochs to wait, at least 1.
        min_delta: Least change that counts as an improvement.
        monitor: The metric's name in the validation metrics.
        mode: `min` if lower is better, or `max`.
    """

    def __init__(
        self,
        patience: int,
        min_delta: float = 0.0,
        monitor: str = "loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}.")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}.")
        self.patience = patience
        self.min_delta = min_delta
        self.monitor = monitor
        self.sign = 1 if mode == "min" else -1
        self.best = float("inf")
        self.waited = 0

    def on_validation_epoch_end(self, epoch: int, val_metrics: Metrics) -> None:
        """Raise StopIteration when patience has run out."""
        value = self.sign * val_metrics[self.monitor]
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            raise StopIteration
