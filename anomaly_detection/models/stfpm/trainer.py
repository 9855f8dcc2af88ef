"""Training of STFPM: the student's features are drawn to the teacher's."""

from typing import Any

import torch
from torch import Tensor

from anomaly_detection.models.stfpm.stfpm import STFPMLoss, STFPMModel
from anomaly_detection.trainer import BaseTrainer


class STFPMTrainer(BaseTrainer):
    """SGD on the student alone; the paper's values are the defaults.

    Args:
        model: The model.
        learning_rate: Of SGD.
        momentum: Of SGD.
        weight_decay: Of SGD.
        **options: Of `BaseTrainer`.
    """

    model: STFPMModel

    def __init__(
        self,
        model: STFPMModel,
        loss_fn: STFPMLoss | None = None,
        *args: Any,
        learning_rate: float = 0.4,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn or STFPMLoss(), *args, **options)
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss of a batch's `image`."""
        return {"loss": self.loss_fn(*self.model(batch["image"]))}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss of each image, (N,), with the model in eval mode."""
        return {"loss": self.loss_fn.per_image(*self.model.extract(batch["image"]))}

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD over the student's parameters."""
        return {
            "optimizer": torch.optim.SGD(
                self.model.student.parameters(),
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        }
