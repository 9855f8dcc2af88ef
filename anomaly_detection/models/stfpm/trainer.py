"""STFPM training: the student learns to match the teacher's features."""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader

from anomaly_detection.features.cache import FeatureCache, Features
from anomaly_detection.features.moments import Moments
from anomaly_detection.features.standardisation import add_channels
from anomaly_detection.metrics import compute_auroc
from anomaly_detection.models.fusion import merged
from anomaly_detection.models.stfpm.stfpm import STFPMLoss, STFPMModel
from anomaly_detection.progress import progress
from anomaly_detection.trainer import (
    Loader,
    LossTrainer,
    Metrics,
    Repeated,
    on_device,
    set_epoch,
    world_size,
)

LEARNING_RATES = {"adamw": 2e-3, "sgd": 0.4}


class STFPMTrainer(LossTrainer):
    """Trains the student alone; by default, AdamW on one cycle of the learning rate.

    Args:
        model: The model.
        loss_fn: STFPMLoss() by default.
        device: As in `BaseTrainer`.
        checkpoint_dir: As in `BaseTrainer`.
        learning_rate: The highest of the cycle (Smith and Topin, 2018); the first of SGD. None for
            the optimizer's own, 2e-3 or 0.4.
        optimizer: `adamw`; or `sgd`, the paper's, with momentum 0.9, and a tenth of the learning
            rate after each third of the epochs.
        weight_decay: The optimizer's.
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
        device: str | torch.device = "auto",
        checkpoint_dir: str | Path | None = "checkpoints",
        learning_rate: float | None = None,
        *,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        weight_decay: float = 1e-4,
        feature_cache: float = 0.0,
        **options: Any,
    ) -> None:
        if optimizer not in LEARNING_RATES:
            raise ValueError(f"optimizer must be 'adamw' or 'sgd', got {optimizer!r}.")
        super().__init__(model, loss_fn or STFPMLoss(), device, checkpoint_dir, **options)
        self.feature_cache = feature_cache
        self._cache: FeatureCache | None = None
        self.optimizer_name, self.weight_decay = optimizer, weight_decay
        self.learning_rate = learning_rate or LEARNING_RATES[optimizer]

    @property
    def train_losses(self) -> list[float]:
        """The mean training loss of each epoch."""
        return [row["train_loss"] for row in self.history]

    @property
    def val_scores(self) -> list[float]:
        """The validation AUROC of each epoch, or the loss where there are only normal images."""
        return [row.get("val_image_auroc", row.get("val_loss", math.nan)) for row in self.history]

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
        once = _once(self.train_loader)
        set_epoch(once, 1)
        for batch in progress(once, "teacher's features", "batches"):
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
        """Loss, score and label of each image, (N,), in eval mode."""
        images = batch["image"]
        teacher, student = self._features(batch)
        anomaly_map = self.model.map_generator(teacher, student, images.shape[-2:])
        losses = self.loss_fn.per_image(teacher, student)
        labels = batch.get("label", torch.zeros(len(losses)))
        return self.model.scored(anomaly_map, images) | {"loss": losses, "label": labels}

    def compute_metrics(self, outputs: list[dict[str, Tensor]]) -> Metrics:
        """`loss`, the mean of the normal images', and `image_auroc` where both labels occur."""
        scores, losses, labels = (
            np.concatenate([torch.as_tensor(row[key]).float().cpu().numpy() for row in outputs])
            for key in ("pred_score", "loss", "label")
        )
        metrics = {}
        if (labels == 0).any():
            metrics["loss"] = float(losses[labels == 0].mean(dtype=np.float64))
        if len(np.unique(labels)) == 2:
            metrics["image_auroc"] = compute_auroc(scores, labels)
        return metrics

    def _is_better(self, current_metrics: Metrics) -> bool:
        """Whether the AUROC is higher, or without one, the loss lower."""
        if self.best_metric and "image_auroc" in current_metrics:
            return current_metrics["image_auroc"] > self.best_metric["image_auroc"]
        return super()._is_better(current_metrics)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer of the student's parameters, and in `fit` its schedule."""
        parameters = self.model.student_model.parameters()
        rate, decay = self.learning_rate, self.weight_decay
        if self.optimizer_name == "sgd":
            sgd = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay)
            third = max(1, math.ceil(self.num_epochs / 3))
            return {"optimizer": sgd, "scheduler": StepLR(sgd, third, gamma=0.1)}
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=decay)
        if not self.num_epochs:  # an epoch by hand
            return {"optimizer": optimizer}
        steps = self.num_epochs * math.ceil(len(self.train_loader) / self.accumulate_batches)
        steps = min(steps, self.num_steps or steps)
        scheduler = OneCycleLR(optimizer, rate, total_steps=steps + 1)
        return {"optimizer": optimizer, "scheduler": scheduler, "interval": "step"}

    def _features(self, batch: dict[str, Any]) -> tuple[Features, Features]:
        return self.model.extract(batch["image"], self._teacher_features(batch))

    @torch.no_grad()
    def _teacher_features(self, batch: dict[str, Any]) -> Features:
        """The teacher's features, from the cache if they are there."""
        known = self._cache.get(batch["path"]) if self._cache else None
        if known:
            return known
        features = self.model.teacher_model(self.model.normalised(batch["image"]))
        if self._cache:
            self._cache.add(batch["path"], features)
        return features


def _once(loader: Loader) -> Loader:
    """The loader, with each image once."""
    return loader.loader if isinstance(loader, Repeated) else loader


def _num_images(loader: Loader) -> int:
    loader = _once(loader)
    if isinstance(loader, DataLoader):
        return len(loader.dataset)  # type: ignore[arg-type]  # PyTorch's Dataset declares no length
    return sum(len(batch["path"]) for batch in loader)
