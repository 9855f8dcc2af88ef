"""Transforms of an image and its mask before they are batched."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomaly_detection.data.decode import resize_image, resize_mask
from anomaly_detection.data.format import IMAGENET, per_channel


def get_test_transforms(image_size: int = 256) -> v2.Transform:
    """Resize to a square of `image_size` pixels, as the pipeline does, and normalise.

    The images become floats, normalised with ImageNet's mean and standard deviation.
    """
    return v2.Compose([Resize(image_size), Normalise()])


def get_train_transforms(
    image_size: int = 256, horizontal_flip: float = 0.0, vertical_flip: float = 0.0
) -> v2.Transform:
    """The test transforms, with flips in between by the given probabilities in [0, 1]."""
    flips = [v2.RandomHorizontalFlip(horizontal_flip), v2.RandomVerticalFlip(vertical_flip)]
    return v2.Compose([Resize(image_size), *(flip for flip in flips if flip.p > 0), Normalise()])


class Resize(v2.Transform):
    """Resize images (1, 3 or 4, H, W) and masks (1, H, W) to `size` x `size` pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Tensor:
        """Resize one image or mask; torchvision calls this for each."""
        planes = inpt.as_subclass(Tensor).numpy()
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.Mask(torch.tensor(resize_mask(planes[0], self.size))[None])
        pixels = planes[0] if len(planes) == 1 else np.ascontiguousarray(np.moveaxis(planes, 0, -1))
        return tv_tensors.Image(torch.tensor(resize_image(pixels, self.size)[: len(planes)]))


class Normalise(v2.Transform):
    """Images of 8 or 16 bits (C, H, W) as floats, with ImageNet's mean and deviation; not masks."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Tensor:
        """Normalise one image; torchvision calls this for each."""
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        pixels = inpt.as_subclass(Tensor)
        unit = pixels.float() / torch.iinfo(pixels.dtype).max
        mean, deviation = (torch.tensor(per_channel(x, max(3, len(unit)))) for x in IMAGENET)
        return tv_tensors.Image((unit - mean[:, None, None]) / deviation[:, None, None])
