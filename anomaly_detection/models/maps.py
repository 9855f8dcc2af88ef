"""Anomaly maps: resizing, and the image score."""

import torch.nn.functional as F
from torch import Tensor


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, C, H, W) resized bilinearly to `size`, unless they have it already."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def image_scores(maps: Tensor, top_fraction: float) -> Tensor:
    """The mean of the highest values of each map.

    Args:
        maps: Shape (N, 1, H, W).
        top_fraction: Share of the pixels, in [0, 1]: 0 gives the maximum, 1 the mean.

    Returns:
        Shape (N,).
    """
    pixels = maps.flatten(1)
    count = max(1, round(top_fraction * pixels.shape[1]))
    return pixels.topk(count, sorted=False).values.mean(dim=1)
