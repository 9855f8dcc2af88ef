"""Changes of images, at random (Batzner et al., WACV 2024, arXiv:2303.14535, algorithm 1)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import (
    Compose,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from torchvision.transforms.v2.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
)

from anomaly_detection.trainer import Loader, set_epoch

COLOUR = (0.8, 1.2)  # range of the factor of brightness, contrast or saturation
CROP = (0.25, 1.0)  # range of the share of an image that is left
GREY = 0.3  # probability that an image loses its colours


def recoloured(images: Tensor) -> Tensor:
    """Images in [0, 1] with another brightness, contrast or saturation (algorithm 1).

    A fourth channel changes as a grey image of its own does.
    """
    change = (adjust_brightness, adjust_contrast, adjust_saturation)[int(torch.randint(3, ()))]
    factor = torch.empty(()).uniform_(*COLOUR).item()
    return torch.cat([change(part, factor) for part in images.split(3, dim=1)], dim=1)


def varied(images: Tensor) -> Tensor:
    """Parts of images in [0, 1], at random, of the same size; some mirrored, some grey.

    A fourth channel has no colours to lose.
    """
    parts = Compose([RandomResizedCrop(images.shape[-2:], CROP), RandomHorizontalFlip()])(images)
    return torch.cat([RandomGrayscale(GREY)(parts[:, :3]), parts[:, 3:]], dim=1)


def endless(loader: Loader, epoch: int) -> Iterator[Any]:
    """The batches of one epoch after the other, from `epoch` on."""
    while True:
        set_epoch(loader, epoch)
        yield from loader
        epoch += 1
