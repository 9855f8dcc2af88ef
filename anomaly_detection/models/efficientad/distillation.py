"""A patch description network that learns a backbone's features (section 3.1 of EfficientAD).

The paper distils a WideResNet-101 on ImageNet for 60,000 steps. This takes any backbone, and the
images there are: those of the product, and others that do not show it.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_detection.features.images import as_floats
from anomaly_detection.features.moments import Moments
from anomaly_detection.features.standardisation import Standardisation, add_channels
from anomaly_detection.models.efficientad.augmentation import endless, recoloured, varied
from anomaly_detection.models.efficientad.teachers import PatchTeacher, PyramidTeacher
from anomaly_detection.models.fusion import merged
from anomaly_detection.models.maps import resize_maps
from anomaly_detection.progress import progress
from anomaly_detection.trainer import Loader, LossTrainer, on_device


class Distillation(nn.Module):
    """A backbone's level and the network that learns it.

    Args:
        pyramid: The backbone's level.
        size: Of the network.
        in_channels: Of the images.
    """

    def __init__(self, pyramid: PyramidTeacher, size: str, in_channels: int = 3) -> None:
        super().__init__()
        self.pyramid, self.in_channels = pyramid, in_channels
        self.standardisation = Standardisation(pyramid.channels)
        self.patches = PatchTeacher(size, pyramid.channels, in_channels).requires_grad_(True)
        self.for_pyramid, self.for_patches = pyramid.normalisation, self.patches.normalisation

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The backbone's features (N, C, h, w) of images in [0, 1]."""
        return self.pyramid(self.for_pyramid(images)).float()

    def differences(self, images: Tensor) -> Tensor:
        """Squared differences of the features (N, C, h, w) of images in [0, 1]."""
        found = self.patches(self.for_patches(images)).float()
        wanted = self.standardisation(self.features(images))
        return (found - at_patches(wanted, images, found)).square()


def at_patches(features: Tensor, images: Tensor, patches: Tensor) -> Tensor:
    """Features that cover the image, where a network without padding has its own."""
    height, width = (side // PatchTeacher.stride for side in images.shape[-2:])
    features = resize_maps(features, (height, width))
    top, left = (height - patches.shape[-2]) // 2, (width - patches.shape[-1]) // 2
    return features[:, :, top : top + patches.shape[-2], left : left + patches.shape[-1]]


class DistillationTrainer(LossTrainer):
    """Adam, as the paper's, on parts of images with other colours.

    Args:
        model: What to train.
        auxiliary: Batches of images that do not show the product, or None.
        **options: Passed on to `BaseTrainer`.
    """

    model: Distillation

    def __init__(self, model: Distillation, auxiliary: Loader | None, **options: Any) -> None:
        super().__init__(model, **options)
        self.auxiliary = auxiliary
        self._others: Iterator[Any] = iter(())

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Standardise the backbone's features in a pass over all images."""
        moments = Moments()
        for loader in (self.train_loader, self.auxiliary or []):
            for batch in progress(loader, "backbone's features", "batches"):
                images = self._floats(on_device(batch, self.device))
                add_channels(moments, self.model.features(images))
        self.model.standardisation.estimate(merged([moments])[0])

    def on_train_epoch_start(self, epoch: int) -> None:
        """The other images in an order that depends on the epoch alone."""
        if self.auxiliary is not None:
            self._others = endless(self.auxiliary, epoch + 1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The mean squared difference, of the product's images and of as many others."""
        shown = [batch, *(on_device(x, self.device) for x in islice(self._others, 1))]
        images = torch.cat([recoloured(varied(self._floats(x))) for x in shown])
        return {"loss": self.model.differences(images).mean()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The mean squared difference of each image, (N,)."""
        return {"loss": self.model.differences(self._floats(batch)).mean(dim=(1, 2, 3))}

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam, 1e-4 with a weight decay of 1e-5 (appendix)."""
        trained = self.model.patches.parameters()
        return {"optimizer": torch.optim.Adam(trained, 1e-4, weight_decay=1e-5)}

    def _floats(self, batch: dict[str, Any]) -> Tensor:
        return as_floats(batch["image"], self.model.in_channels)
