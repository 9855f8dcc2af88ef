"""Transforms of an image and its mask before they are batched."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomaly_detection.data.decode import resize_image, resize_mask


def get_test_transforms(image_size: int) -> v2.Transform:
    """Resize to a square of `image_size` pixels, as the pipeline does.

    Values stay integers: normalisation is part of the model.
    """
    return v2.Compose([Resize(image_size)])


def get_train_transforms(
    image_size: int, horizontal_flip: float = 0.0, vertical_flip: float = 0.0
) -> v2.Transform:
    """The test resize, then flips with the given probabilities in [0, 1]."""
    flips = [v2.RandomHorizontalFlip(horizontal_flip), v2.RandomVerticalFlip(vertical_flip)]
    return v2.Compose([Resize(image_size), *(flip for flip in flips if flip.p > 0)])


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
