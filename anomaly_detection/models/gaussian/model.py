"""A Gaussian distribution of the features at each position of each level.

After PaDiM (Defard et al., ICPR 2021, arXiv:2011.08785), with three differences. PaDiM joins the
levels, keeps random channels of all and takes one distance; here each level has a Gaussian of its
own, and the levels' maps are standardised and averaged. Each covariance is shrunk
towards the mean one of all positions, so that a few dozen images suffice. And what is added to the
variances follows the features' own, so that it does not depend on the backbone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from anomaly_detection.features.cache import Features
from anomaly_detection.features.moments import Moments
from anomaly_detection.models.gaussian.config import Parameters
from anomaly_detection.models.maps import whitening_of, with_neighbours
from anomaly_detection.models.pyramid import PyramidModel
from anomaly_detection.trainer import TrainingError

REGULARISATION = 0.01  # of the features' mean variance, added to every variance


class Gaussian(nn.Module):
    """The Mahalanobis distance from the mean at each position, divided by the root of C.

    The squared distance is |W (x - mean)|^2, where W inverts the covariance's Cholesky factor: a
    matrix product.

    Args:
        num_positions: P = H x W.
        num_features: Number of channels that the features have.
        num_channels: How many of them are used, C.
        is_shared: Whether all positions have the same covariance.
    """

    channels: Tensor
    mean: Tensor
    whitening: Tensor
    count = 0  # images of the fit, until the model is saved
    own_share = 1.0  # of a position's covariance in the one that is used

    def __init__(
        self, num_positions: int, num_features: int, num_channels: int, is_shared: bool
    ) -> None:
        super().__init__()
        self.num_features = num_features
        num_matrices = 1 if is_shared else num_positions
        self.register_buffer("channels", torch.arange(num_channels))
        self.register_buffer("mean", torch.zeros(num_positions, num_channels))
        self.register_buffer("whitening", torch.zeros(num_matrices, num_channels, num_channels))

    def choose_channels(self, generator: torch.Generator) -> None:
        """Draw the channels to use."""
        order = torch.randperm(self.num_features, generator=generator)
        self.channels.copy_(order[: len(self.channels)].sort().values)

    def select(self, features: Tensor) -> Tensor:
        """The channels (N, C, H, W) that are used."""
        return features[:, self.channels] if len(self.channels) < self.num_features else features

    def estimate(self, moments: Moments, shrinkage: float) -> None:
        """Set mean and covariance.

        Raises:
            TrainingError: There are fewer than two images, or features are not finite.
        """
        if moments.count < 2:
            raise TrainingError(f"the fit must have at least two images, got {moments.count}.")
        if not moments.is_finite:
            raise TrainingError(
                "features must be finite, got others; set training.precision to float32."
            )
        covariance = moments.scatter / (moments.count - 1)
        shared = covariance.mean(dim=0, keepdim=True)
        shrunk = shared if shrinkage == 1 else torch.lerp(covariance, shared, shrinkage)
        variance = shared.diagonal(dim1=1, dim2=2).mean()
        whitening = whitening_of(shrunk, REGULARISATION * variance)
        self.count, self.own_share = moments.count, 1 - shrinkage
        self.mean = moments.mean.float().to(self.mean.device)
        self.whitening = whitening.float().to(self.mean.device)

    def forward(self, features: Tensor) -> Tensor:
        """Distances (N, H, W) of the chosen channels (N, C, H, W)."""
        num_images, _, height, width = features.shape
        centred = features.flatten(2).permute(2, 1, 0) - self.mean[:, :, None]  # (P, C, N)
        distances = (self.whitening @ centred).square().mean(dim=1).sqrt()
        return distances.T.reshape(num_images, height, width)

    def held_out(self, features: Tensor) -> Tensor:
        """As `forward`, of images of the fit, with mean and covariance without that image.

        Without a vector x, a covariance of n is in proportion to C - n / (n - 1)^2 (x - m)(x - m)',
        and the Sherman-Morrison formula gives its inverse. That the mean covariance changes as
        well, by the number of positions less, is neglected.
        """
        squared, n = self(features).square(), self.count
        if not n:
            return squared.sqrt()
        num_channels = len(self.channels)
        loss = self.own_share * n / (n - 1) ** 2 * num_channels * squared
        remaining = (1 - loss).clamp(min=1 / n)
        return (squared / remaining * n**2 * max(n - 2, 1) / (n - 1) ** 3).sqrt()


class GaussianModel(PyramidModel):
    """Backbone and Gaussians.

    Args:
        *args: As in `PyramidModel`.
        max_channels: How many channels of a level are used at most.
        is_shared: Whether all positions of a level have the same covariance.
        **options: As in `PyramidModel`.
    """

    strides = Parameters.strides
    fits_validation = True
    gaussians: Any  # a ModuleList of Gaussian

    def __init__(
        self, *args: Any, max_channels: int = 128, is_shared: bool = False, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.max_channels, self.is_shared = max_channels, is_shared
        sizes = [scale.mean.numel() for scale in self.scales] or [0] * len(self.layers)
        self.gaussians = nn.ModuleList(
            Gaussian(size, channels, min(channels, max_channels), is_shared)
            for size, channels in zip(sizes, self.teacher_model.num_channels, strict=True)
        )

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments."""
        own = {"max_channels": self.max_channels, "is_shared": self.is_shared}
        return own | super().hyperparameters

    def extract(self, images: Tensor) -> list[Tensor]:
        """The chosen channels of each level, float32; the finest `with_neighbours`.

        The finest level's features are noisy, and the coarser ones see the neighbours anyway.
        """
        features: Features = self.teacher_model(self.normalised(images))
        levels = [
            gaussian.select(level.float())
            for gaussian, level in zip(self.gaussians, features.values(), strict=True)
        ]
        return [with_neighbours(levels[0]), *levels[1:]]

    def maps(self, images: Tensor) -> list[Tensor]:
        """Distances (N, H, W) at each level."""
        levels = self.extract(images)
        with torch.autocast(images.device.type, enabled=False):
            return [gaussian(level) for gaussian, level in zip(self.gaussians, levels, strict=True)]

    def held_out_maps(self, batch: dict[str, Any], device: torch.device) -> list[Tensor]:
        """Distances at each level, for images of the fit, from the distribution of the others."""
        levels = zip(self.gaussians, self.extract(batch["image"].to(device)), strict=True)
        return [gaussian.held_out(level) for gaussian, level in levels]
