"""Built-in callbacks."""

from typing import Any, Literal

import torch

from anomaly_detection.errors import TrainingError
from anomaly_detection.trainer.hooks import Callback, Metrics


class EarlyStopping(Callback):
    """End training when a validation metric has not improved for `patience` epochs.

    Args:
        patience: Epochs to wait, at least 1.
        min_delta: Smallest change that counts as an improvement.
        monitor: The metric's name in the validation metrics.
        mode: `min` if lower is better, `max` if higher is.
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
        if self.monitor not in val_metrics:
            raise TrainingError(
                f"early stopping must monitor one of {sorted(val_metrics)}, got {self.monitor!r}; "
                "set training.early_stopping_patience to null, or monitor another metric."
            )
        value = self.sign * val_metrics[self.monitor]
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """The best value, and the epochs since."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best value and the wait."""
        self.best, self.waited = state["best"], state["waited"]


class GradientClipping(Callback):
    """Scale the gradients down so that their total norm is at most `max_norm`."""

    def __init__(self, max_norm: float) -> None:
        if max_norm <= 0:
            raise ValueError(f"max_norm must be greater than 0, got {max_norm}.")
        self.max_norm = max_norm

    def on_before_optimizer_step(self) -> None:
        """Clip here: after the optimizer's step it would have no effect."""
        for group in self.trainer.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], self.max_norm)


class LearningRateLogger(Callback):
    """Collect each epoch's learning rate in `learning_rates`."""

    def __init__(self) -> None:
        self.learning_rates: list[float] = []

    def on_train_epoch_start(self, epoch: int) -> None:
        """Record the rate that this epoch trains with."""
        self.learning_rates.append(self.trainer.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """The rates so far."""
        return {"learning_rates": self.learning_rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the list."""
        self.learning_rates = list(state["learning_rates"])
