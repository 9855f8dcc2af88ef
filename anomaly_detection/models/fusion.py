"""Several anomaly maps as one: each is brought to the same scale, and their mean is taken.

No map speaks louder than another then.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from anomaly_detection.features.images import check_images, judged
from anomaly_detection.models.contract import AnomalyModel
from anomaly_detection.models.maps import MapScale, image_scores, resize_maps
from anomaly_detection.progress import progress
from anomaly_detection.trainer import Loader, TrainingError, gather

Statistics = TypeVar("Statistics", bound=Any)


class ScaledMapModel(AnomalyModel):
    """A model that finds several maps; a subclass defines them and its fit ends with `standardise`.

    Args:
        top_fraction: The image score is the mean of this share of the map's highest values, in
            [0, 1]: 0 is the maximum, 1 the mean.
        map_sizes: Height and width of each map, for a model that is to load a state dict.
        in_channels: Of the images; a further one says where they are judged.
        image_size: Their height and width, for a model that is to load a state dict; `standardise`
            sets it. None, as of models from before it was known: not checked.
    """

    scale_type: ClassVar[Any] = MapScale  # a subclass may bring maps to another scale
    fits_validation: ClassVar[bool] = False  # whether its fit uses the validation images as well
    scales: Any  # a ModuleList of it; nn.Module does not declare what its items have

    def __init__(
        self,
        top_fraction: float,
        map_sizes: Sequence[Sequence[int]],
        in_channels: int = 3,
        image_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= top_fraction <= 1:
            raise ValueError(f"top_fraction must be in [0, 1], got {top_fraction}.")
        self.top_fraction, self.in_channels = top_fraction, in_channels
        self.image_size = None if image_size is None else list(image_size)
        self.scales = nn.ModuleList(self.scale_type(size) for size in map_sizes)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments; a subclass adds its own."""
        sizes = [list(scale.size) for scale in self.scales]
        own = {"top_fraction": self.top_fraction, "in_channels": self.in_channels}
        return own | {"map_sizes": sizes, "image_size": self.image_size}

    def maps(self, images: Tensor) -> list[Tensor]:
        """Maps (N, H, W) of what is unusual, of any scale; the first gives the common size."""
        raise NotImplementedError

    def held_out_maps(self, batch: dict[str, Any], device: torch.device) -> list[Tensor]:
        """`maps` of normal images as if the fit had not seen them.

        These are the maps themselves unless a subclass is fitted to the images that scale it.
        """
        return self.maps(batch["image"].to(device))

    def held_out_map(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        """As in `AnomalyModel`."""
        size = (batch["image"].shape[-2], batch["image"].shape[-1])
        return self.combined(self.held_out_maps(batch, device), size)

    @torch.no_grad()
    def standardise(self, loader: Loader, device: torch.device) -> None:
        """Estimate the scale of each map from `held_out_maps`.

        Args:
            loader: Batches of normal images.
            device: Where the model is.

        Raises:
            TrainingError: There are no images, or maps are not finite.
        """
        self.eval()
        levels: list[Any] = []
        for batch in progress(loader, "scale of the maps", "batches"):
            self.image_size = list(batch["image"].shape[-2:])
            maps = self.held_out_maps(batch, device)
            levels = levels or [self.scale_type.statistics() for _ in maps]
            for statistics, level in zip(levels, maps, strict=True):
                statistics.add(level[:, None])
        levels = merged(levels)
        if not levels or not all(statistics.is_finite for statistics in levels):
            raise TrainingError(
                "anomaly maps of normal images must be finite, and there must be some, got "
                f"{levels[0].count if levels else 0} images."
            )
        self.scales = nn.ModuleList(self.scale_type(x.size) for x in levels).to(device)
        for scale, statistics in zip(self.scales, levels, strict=True):
            scale.estimate(statistics)

    def forward(self, images: Tensor) -> Any:
        """`pred_score` (N,) and `anomaly_map` (N, 1, H, W), in units of the scales.

        Where a channel after `in_channels` is 0, the map is 0 and does not count.

        Raises:
            TrainingError: The model is not fitted.
            ValueError: As in `check_images`.
        """
        if not self.scales:
            raise TrainingError("the model must be fitted before images can be scored.")
        check_images(images, self.in_channels, self.image_size)
        size = (images.shape[-2], images.shape[-1])
        return self.scored(self.combined(self.maps(images), size), images)

    def combined(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """The mean of maps (N, h, w), each on its scale, enlarged to a size: (N, 1, H, W)."""
        scaled = [scale(level)[:, None] for scale, level in zip(self.scales, maps, strict=True)]
        first = (scaled[0].shape[-2], scaled[0].shape[-1])
        mean = torch.stack([resize_maps(level, first) for level in scaled]).mean(dim=0)
        return resize_maps(mean, size)

    def scored(self, anomaly_map: Tensor, images: Tensor) -> dict[str, Tensor]:
        """`pred_score` (N,) and `anomaly_map` (N, 1, H, W), 0 where images are not judged."""
        region = judged(images, self.in_channels)
        if region is not None:
            anomaly_map = torch.where(region, anomaly_map, 0.0)
        return {
            "pred_score": image_scores(anomaly_map, self.top_fraction, region),
            "anomaly_map": anomaly_map,
        }


def merged(levels: list[Statistics]) -> list[Statistics]:
    """The statistics of each level, over the images of all processes."""
    parts = [part for part in gather([levels]) if part]
    whole = parts[0] if parts else []
    for part in parts[1:]:
        for statistics, others in zip(whole, part, strict=True):
            statistics.merge(others)
    return whole
