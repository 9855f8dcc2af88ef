"""A trainer that chooses its best epoch by the validation loss."""

from typing import Any

from anomaly_detection.errors import TrainingError
from anomaly_detection.trainer.batches import means
from anomaly_detection.trainer.hooks import Metrics
from anomaly_detection.trainer.loop import BaseTrainer


class LossTrainer(BaseTrainer):
    """Trains like `BaseTrainer`; the epoch with the lowest mean validation loss is the best.

    `validation_step` returns a dict with `loss`, best with one for each image, and perhaps further
    values.
    """

    def compute_metrics(self, outputs: list[Any]) -> Metrics:
        """The mean of each value that all validation steps returned, over all its elements."""
        return means(outputs)

    def _is_better(self, current_metrics: Metrics) -> bool:
        """Whether the loss is lower than that of the best epoch; without any, each is better."""
        if not current_metrics:
            return True
        if "loss" not in current_metrics:
            raise TrainingError(
                "validation metrics must have 'loss' to choose the best epoch, got "
                f"{sorted(current_metrics)}; return it from validation_step or override _is_better."
            )
        return self.best_metric is None or current_metrics["loss"] < self.best_metric["loss"]
