"""What models that judge a pretrained backbone's features have in common."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anomaly_detection.features.config import PyramidParameters
from anomaly_detection.features.images import as_floats
from anomaly_detection.features.pyramid import FeaturePyramid, Normalisation
from anomaly_detection.features.weights import BUNDLED
from anomaly_detection.models.fusion import ScaledMapModel


class PyramidModel(ScaledMapModel):
    """A frozen, pretrained backbone, and what a subclass makes of its features.

    Args:
        backbone: timm model.
        layers: Levels to use; None for those at the class's `strides`.
        weights: The backbone's, as in `FeaturePyramid`.
        top_fraction: As in `ScaledMapModel`.
        map_sizes: As in `ScaledMapModel`.
        in_channels: As in `ScaledMapModel`.
        image_size: As in `ScaledMapModel`.

    The backbone has no gradients and stays in eval mode.
    """

    strides: Sequence[int]
    normalisation: Normalisation

    def __init__(
        self,
        backbone: str = BUNDLED,
        layers: Sequence[str] | None = None,
        weights: str = "bundled",
        top_fraction: float = 0.0,
        map_sizes: Sequence[Sequence[int]] = (),
        in_channels: int = 3,
        image_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__(top_fraction, map_sizes, in_channels, image_size)
        self.backbone = backbone
        pyramid = FeaturePyramid(backbone, layers, weights, self.strides, in_channels)
        self.teacher_model = pyramid.freeze()
        self.layers = self.teacher_model.layers if layers is None else layers
        self.normalisation = self.teacher_model.normalisation

    def normalised(self, images: Tensor) -> Tensor:
        """Images as `forward` takes them, as the backbone does."""
        return self.normalisation(as_floats(images, self.in_channels))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments; the weights come from the state dict."""
        own = {"backbone": self.backbone, "layers": self.teacher_model.layers, "weights": "random"}
        return own | super().hyperparameters

    def simplify(self) -> None:
        """Fold BatchNorm into the convolutions."""
        self.teacher_model.fold_batch_norm()


def pyramid_options(parameters: PyramidParameters) -> dict[str, Any]:
    """The arguments of a `PyramidModel` for its parameters."""
    return parameters.model_dump(include={"backbone", "layers", "weights", "top_fraction"})
