"""Anomaly maps: resizing, standardising, and the image score."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_detection.features.moments import Moments

WINDOW = 3  # positions; a position's statistics are those of a square of this side around it
PRIOR_IMAGES = 128  # how many images the statistics of all positions count for


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, C, H, W) resized bilinearly to `size`, unless they have it already."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def mean_of_neighbours(maps: Tensor, window: int = WINDOW) -> Tensor:
    """Each position's mean over the window around it, of which only what is in the map counts."""
    return F.avg_pool2d(maps, window, stride=1, padding=window // 2, count_include_pad=False)


def with_neighbours(features: Tensor) -> Tensor:
    """Features (N, C, H, W), half a position's own and half the mean over 3 x 3 around it.

    Their mean alone would blur small defects, and a position's own features are noisy.
    """
    return 0.5 * (features + mean_of_neighbours(features))


def whitening_of(covariance: Tensor, added: Tensor) -> Tensor:
    """W (..., C, C) with |W x|^2 = x' (covariance + added I)^-1 x; lower triangular, float64.

    Args:
        covariance: float64, (..., C, C).
        added: To each variance.
    """
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    factor = torch.linalg.cholesky(covariance + added.clamp(min=1e-14) * identity)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def image_scores(maps: Tensor, top_fraction: float, region: Tensor | None = None) -> Tensor:
    """The mean of the highest values of each map.

    Args:
        maps: Shape (N, 1, H, W).
        top_fraction: Share of the pixels that count, in [0, 1]: 0 gives the maximum, 1 the mean.
        region: Which pixels of each image count, bool (N, 1, H, W); None for all.

    Returns:
        Shape (N,).
    """
    pixels = maps.flatten(1)
    count = max(1, round(top_fraction * pixels.shape[1]))
    if region is None:
        return pixels.topk(count, sorted=False).values.mean(dim=1)
    inside = region.flatten(1)
    counts = (top_fraction * inside.sum(dim=1, keepdim=True)).round().clamp(min=1)
    lowest = torch.finfo(pixels.dtype).min
    highest = pixels.masked_fill(~inside, lowest).topk(count).values
    is_counted = torch.arange(count, device=maps.device) < counts
    return torch.where(is_counted, highest, 0.0).sum(dim=1) / counts[:, 0]


class MapScale(nn.Module):
    """Standardises maps: how many standard deviations above the mean of normal images.

    What is usual differs between positions: at the border of an image, at an edge of the product.
    Mean and standard deviation are estimated for each position, from maps of normal images as of
    images that the fit has not seen; the fewer there are, the more they lean on those of all
    positions.

    Args:
        size: Height and width of the maps, in positions.
    """

    statistics = Moments
    mean: Tensor
    deviation: Tensor

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(*size))
        self.register_buffer("deviation", torch.ones(*size))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the maps."""
        return self.mean.shape[0], self.mean.shape[1]

    def estimate(self, moments: Moments) -> None:
        """Set mean and deviation from the moments of maps (n, 1, H, W)."""
        means = moments.mean.view(1, *moments.size)
        squares = moments.scatter.view(1, *moments.size) / moments.count + means.square()
        overall = means.mean()
        overall_variance = squares.mean() - overall.square()
        mean, square = mean_of_neighbours(means)[0], mean_of_neighbours(squares)[0]
        trust = moments.count / (moments.count + PRIOR_IMAGES)
        variance = trust * (square - mean.square()) + (1 - trust) * overall_variance
        device = self.mean.device
        self.mean = (trust * mean + (1 - trust) * overall).float().to(device)
        smallest = torch.finfo(torch.float32).tiny
        self.deviation = variance.clamp(min=smallest).sqrt().float().to(device)

    def forward(self, maps: Tensor) -> Tensor:
        """Standardised maps (N, H, W).

        Raises:
            ValueError: The maps have another size.
        """
        require_size(maps, self.size)
        return (maps - self.mean) / self.deviation


def require_size(maps: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError unless maps (N, H, W) are of a size."""
    if tuple(maps.shape[-2:]) != size:
        raise ValueError(
            f"images must have the size that the model was fitted on, whose maps are {size}, got "
            f"maps of {tuple(maps.shape[-2:])}."
        )
