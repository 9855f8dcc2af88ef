"""STFPM training: the student learns to match the teacher's features."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from anomaly_detection.features.cache import FeatureCache, Features
from anomaly_detection.models.stfpm.model import STFPMLoss, STFPMModel
from anomaly_detection.trainer import BaseTrainer, Loader, set_epoch, world_size


class STFPMTrainer(BaseTrainer):
    """SGD on the student alone; the paper's values are the defaults.

    Args:
        model: The model.
        learning_rate: SGD's.
        momentum: SGD's.
        weight_decay: SGD's.
        feature_cache: Disk space in GB, beside the checkpoints, for the teacher's features of all
            images: if they fit, they are computed in the first epoch only. For a CPU and a single
            process, and for images that never change: batches name them in `path`.
        **options: Passed on to `BaseTrainer`.
    """

    model: STFPMModel
    loss_fn: STFPMLoss

    def __init__(
        self,
        model: STFPMModel,
        loss_fn: STFPMLoss | None = None,
        *args: Any,
        learning_rate: float = 0.4,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        feature_cache: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn or STFPMLoss(), *args, **options)
        self.feature_cache = feature_cache
        self._cache: FeatureCache | None = None
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay

    def on_fit_start(self) -> None:
        """Create the cache; a resumed training fills it again as its first epoch did."""
        if self.feature_cache and self.device.type == "cpu" and world_size() == 1:
            self._cache = self._make_cache()

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
        """SGD over the student's parameters."""
        return {
            "optimizer": torch.optim.SGD(
                self.model.student.parameters(),
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        }

    def _features(self, batch: dict[str, Any]) -> tuple[Features, Features]:
        known = self._cache.get(batch["path"]) if self._cache else None
        teacher, student = self.model.extract(batch["image"], known)
        if self._cache and not known:
            self._cache.add(batch["path"], teacher)
        return teacher, student

    def _make_cache(self) -> FeatureCache:
        loaders = [loader for loader in (self.train_loader, self.val_loader) if loader is not None]
        num_images = sum(map(_num_images, loaders))
        cache = FeatureCache(self.checkpoint_dir, num_images, self.feature_cache * 1e9)
        for loader in loaders if self.epoch else []:
            set_epoch(loader, 1)
            for batch in loader:
                with torch.no_grad(), self._autocast():
                    images = self.model.normalisation(batch["image"])
                    cache.add(batch["path"], self.model.teacher(images))
        return cache


def _num_images(loader: Loader) -> int:
    if isinstance(loader, DataLoader):
        return len(loader.dataset)  # type: ignore[arg-type]  # PyTorch's Dataset declares no length
    return sum(len(batch["path"]) for batch in loader)
