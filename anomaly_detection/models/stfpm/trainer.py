"""STFPM training: the student learns to match the teacher's features."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from anomaly_detection.features.cache import FeatureCache, Features
from anomaly_detection.features.moments import Moments
from anomaly_detection.features.standardisation import add_channels
from anomaly_detection.models.fusion import merged
from anomaly_detection.models.stfpm.model import STFPMLoss, STFPMModel
from anomaly_detection.progress import progress
from anomaly_detection.trainer import Loader, LossTrainer, on_device, set_epoch, world_size


class STFPMTrainer(LossTrainer):
    """AdamW on the student alone, with one cycle of the learning rate (Smith and Topin, 2018).

    Args:
        model: The model.
        loss_fn: STFPMLoss() by default.
        learning_rate: The highest of the cycle.
        weight_decay: AdamW's.
        feature_cache: Disk space in GB, beside the checkpoints, for the teacher's features of all
            images: if they fit, each is computed once. For a CPU and a single process, and for
            images that never change: batches name them in `path`.
        **options: Passed on to `BaseTrainer`.
    """

    model: STFPMModel
    loss_fn: STFPMLoss

    def __init__(
        self,
        model: STFPMModel,
        loss_fn: STFPMLoss | None = None,
        *args: Any,
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-4,
        feature_cache: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn or STFPMLoss(), *args, **options)
        self.feature_cache = feature_cache
        self._cache: FeatureCache | None = None
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Standardise the teacher's features in a pass over the images, which fills the cache.

        A resumed training does the same again.
        """
        if self.feature_cache and self.device.type == "cpu" and world_size() == 1:
            loaders = [x for x in (self.train_loader, self.val_loader) if x is not None]
            num_images = sum(map(_num_images, loaders))
            self._cache = FeatureCache(self.checkpoint_dir, num_images, self.feature_cache * 1e9)
        channels = [Moments() for _ in self.model.standardisations]
        set_epoch(self.train_loader, 1)
        for batch in progress(self.train_loader, "teacher's features", "batches"):
            with self._autocast():
                features = self._teacher_features(on_device(batch, self.device))
            for moments, level in zip(channels, features.values(), strict=True):
                add_channels(moments, level)
        for moments, standardisation in zip(
            merged(channels), self.model.standardisations, strict=True
        ):
            standardisation.estimate(moments)

    def on_fit_end(self) -> None:
        """Drop the cache and its file."""
        self._cache = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss of a batch's `image`."""
        return {"loss": self.loss_fn(*self._features(batch))}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss of each image, (N,), in eval mode."""
        return {"loss": self.loss_fn.per_image(*self._features(batch))}

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the student's parameters, and the cycle."""
        optimizer = torch.optim.AdamW(
            self.model.student.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        steps = self.num_epochs * math.ceil(len(self.train_loader) / self.accumulate_batches)
        steps = min(steps, self.num_steps or steps)
        scheduler = OneCycleLR(optimizer, self.learning_rate, total_steps=steps + 1)
        return {"optimizer": optimizer, "scheduler": scheduler, "interval": "step"}

    def _features(self, batch: dict[str, Any]) -> tuple[Features, Features]:
        return self.model.extract(batch["image"], self._teacher_features(batch))

    @torch.no_grad()
    def _teacher_features(self, batch: dict[str, Any]) -> Features:
        """The teacher's features, from the cache if they are there."""
        known = self._cache.get(batch["path"]) if self._cache else None
        if known:
            return known
        features = self.model.teacher(self.model.normalisation(batch["image"]))
        if self._cache:
            self._cache.add(batch["path"], features)
        return features


def _num_images(loader: Loader) -> int:
    if isinstance(loader, DataLoader):
        return len(loader.dataset)  # type: ignore[arg-type]  # PyTorch's Dataset declares no length
    return sum(len(batch["path"]) for batch in loader)
