"""EfficientAD's scale of maps (Batzner et al., WACV 2024, arXiv:2303.14535, section 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anomaly_detection.models.maps import require_size

QUANTILES = (0.9, 0.995)
TARGET = 0.1  # what the upper one becomes; the lower one becomes 0


class Pixels:
    """All pixels of maps.

    Attributes:
        count: Number of maps.
        size: Their height and width.
    """

    size: tuple[int, int]

    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    @property
    def count(self) -> int:
        """Number of maps."""
        return sum(map(len, self.maps))

    @property
    def is_finite(self) -> bool:
        """Whether all pixels are, and there are any."""
        return self.count > 0 and all(bool(maps.isfinite().all()) for maps in self.maps)

    def add(self, maps: Tensor) -> None:
        """Add maps (N, 1, H, W)."""
        self.maps.append(maps.float().cpu())
        self.size = (maps.shape[-2], maps.shape[-1])

    def merge(self, part: "Pixels") -> None:
        """Add what another object has seen."""
        for maps in part.maps:
            self.add(maps)


class QuantileScale(nn.Module):
    """Brings two quantiles of normal images' pixels to 0 and 0.1, the same for all positions.

    Args:
        size: Height and width of the maps, in positions.
    """

    statistics = Pixels
    low: Tensor
    width: Tensor

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = (size[0], size[1])
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("width", torch.tensor(1.0))

    def estimate(self, pixels: Pixels) -> None:
        """Set the quantiles, interpolated linearly between pixels."""
        values = torch.cat([maps.flatten() for maps in pixels.maps]).double().sort().values
        low, high = (_interpolated(values, quantile) for quantile in QUANTILES)
        self.low.copy_(low)
        self.width.copy_((high - low).clamp(min=torch.finfo(torch.float32).tiny))

    def forward(self, maps: Tensor) -> Tensor:
        """Scaled maps (N, H, W).

        Raises:
            ValueError: The maps have another size.
        """
        require_size(maps, self.size)
        return TARGET * (maps - self.low) / self.width


def _interpolated(ascending: Tensor, quantile: float) -> Tensor:
    """A quantile; torch.quantile takes no more than 16 million values."""
    place = quantile * (len(ascending) - 1)
    below = int(place)
    above = min(below + 1, len(ascending) - 1)
    return torch.lerp(ascending[below], ascending[above], place - below)
