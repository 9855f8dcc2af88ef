"""EfficientAD's training (Batzner et al., WACV 2024, arXiv:2303.14535, algorithm 1)."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

from anomaly_detection.features.images import as_floats
from anomaly_detection.features.moments import Moments
from anomaly_detection.features.standardisation import add_channels
from anomaly_detection.models.efficientad.augmentation import (
    endless,
    recoloured,
    varied,
)
from anomaly_detection.models.efficientad.losses import hard_feature_loss, mean_square
from anomaly_detection.models.efficientad.model import EfficientADModel
from anomaly_detection.models.fusion import merged
from anomaly_detection.progress import progress
from anomaly_detection.trainer import Loader, LossTrainer, on_device, set_epoch

DECAY = 0.95  # share of the steps after which the learning rate is a tenth


class EfficientADTrainer(LossTrainer):
    """Adam on student and autoencoder.

    Args:
        model: The model.
        auxiliary: Batches of images that do not show the product, for the penalty; None for none.
        learning_rate: Adam's.
        weight_decay: Adam's.
        **options: Passed on to `BaseTrainer`.
    """

    model: EfficientADModel

    def __init__(
        self,
        model: EfficientADModel,
        auxiliary: Loader | None = None,
        *,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.auxiliary = auxiliary
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self._others: Iterator[Any] = iter(())

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Standardise the teacher's features in a pass over the images (section 3.1).

        A resumed training does the same again.
        """
        moments = Moments()
        set_epoch(self.train_loader, 1)
        for batch in progress(self.train_loader, "teacher's features", "batches"):
            images = self._floats(on_device(batch, self.device))
            with self._autocast():
                add_channels(moments, self.model.teacher(self.model.normalisation(images)))
        self.model.standardisation.estimate(merged([moments])[0])

    def on_train_epoch_start(self, epoch: int) -> None:
        """The images for the penalty in an order that depends on the epoch alone."""
        if self.auxiliary is not None:
            self._others = endless(self.auxiliary, epoch + 1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The losses and the penalty of a batch's `image`; `loss` is their sum."""
        images = self._floats(batch)
        others = [on_device(x, self.device) for x in islice(self._others, 1)]
        shown = [varied(self._floats(other)) for other in others]
        return self._losses(images, recoloured(images), shown)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The losses of images as they are, without penalty; each is repeated for its images."""
        images = self._floats(batch)
        losses = self._losses(images, images, [])
        return {key: value.expand(len(images)) for key, value in losses.items()}

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam, with a tenth of the learning rate in the last steps."""
        trained = [*self.model.student.parameters(), *self.model.autoencoder.parameters()]
        optimizer = torch.optim.Adam(trained, self.learning_rate, weight_decay=self.weight_decay)
        steps = self.num_epochs * math.ceil(len(self.train_loader) / self.accumulate_batches)
        steps = min(steps, self.num_steps or steps)
        scheduler = StepLR(optimizer, max(1, round(DECAY * steps)), gamma=0.1)
        return {"optimizer": optimizer, "scheduler": scheduler, "interval": "step"}

    def _floats(self, batch: dict[str, Any]) -> Tensor:
        return as_floats(batch["image"], self.model.in_channels)

    def _losses(
        self, images: Tensor, recoloured: Tensor, others: list[Tensor]
    ) -> dict[str, Tensor]:
        """L_ST, L_AE, L_STAE (sections 3.2 and 3.3), and their sum, for images in [0, 1]."""
        model, count = self.model, len(images)
        both = model.normalisation(torch.cat([images, recoloured]))
        teacher = model.features(both)
        size = (teacher.shape[-2], teacher.shape[-1])
        shown = torch.cat([both, *map(model.normalisation, others)])
        of_teacher, of_autoencoder = model.student_features(shown, size)
        autoencoder = model.autoencoder(both[count:], size).float()
        losses = {
            "student": hard_feature_loss(teacher[:count], of_teacher[:count]).mean(),
            "autoencoder": mean_square(teacher[count:] - autoencoder),
            "agreement": mean_square(autoencoder - of_autoencoder[count : 2 * count]),
        }
        if others:
            losses["penalty"] = mean_square(of_teacher[2 * count :])
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}
