"""Channels of features with mean 0 and standard deviation 1."""

import torch
from torch import Tensor, nn

from anomaly_detection.features.moments import Moments

FLOOR = 0.1  # of the channels' median deviation: what a channel that hardly ever varies gets


class Standardisation(nn.Module):
    """Brings each channel of a level's features to mean 0 and standard deviation 1.

    Args:
        num_channels: C.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_channels, 1, 1))
        self.register_buffer("deviation", torch.ones(num_channels, 1, 1))

    def estimate(self, moments: Moments) -> None:
        """Set mean and deviation; each of the moments' positions is a channel."""
        deviation = (moments.scatter / moments.count).sqrt()
        floor = (FLOOR * deviation.median()).clamp(min=1e-6)
        self.mean.copy_(moments.mean[..., None])
        self.deviation.copy_(deviation.clamp(min=floor))

    def forward(self, features: Tensor) -> Tensor:
        """Standardised features (N, C, H, W), float32."""
        return (features - self.mean) / self.deviation


def add_channels(moments: Moments, features: Tensor) -> None:
    """Add features (N, C, H, W) to the moments of their channels."""
    moments.add(features.movedim(1, 3).reshape(-1, 1, features.shape[1], 1))
