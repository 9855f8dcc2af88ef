"""EfficientAD: a student and an autoencoder against a teacher (Batzner et al., WACV 2024).

arXiv:2303.14535. On normal images, a student learns to reproduce a frozen teacher's features of
local patches, and an autoencoder to reproduce them from the whole image. A second half of the
student's channels learns what the autoencoder reproduces. Where the student differs from the
teacher, a patch looks unusual; where it differs from the autoencoder, an arrangement does.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_detection.features.images import as_floats
from anomaly_detection.features.standardisation import Standardisation
from anomaly_detection.features.weights import BUNDLED
from anomaly_detection.models.efficientad.config import FEATURES, Parameters
from anomaly_detection.models.efficientad.networks import (
    Autoencoder,
    patch_description_network,
    resized,
)
from anomaly_detection.models.efficientad.scale import QuantileScale
from anomaly_detection.models.efficientad.teachers import PatchTeacher, PyramidTeacher
from anomaly_detection.models.fusion import ScaledMapModel


class EfficientADModel(ScaledMapModel):
    """Teacher, student and autoencoder; images are as in `AnomalyModel`.

    Args:
        teacher: `features` for a level of the backbone, `patches` for a patch description network.
        size: `small` or `medium`, of the student and of such a teacher.
        channels: The number of the teacher's features; None for all of the backbone's.
        backbone: As in `PyramidModel`, for the teacher `features`.
        layers: As in `PyramidModel`; one level.
        weights: As in `PyramidModel`.
        top_fraction: As in `ScaledMapModel`; 0, the maximum, is the paper's.
        map_sizes: As in `ScaledMapModel`.
        in_channels: As in `ScaledMapModel`.
        image_size: As in `ScaledMapModel`.
    """

    scale_type = QuantileScale

    def __init__(
        self,
        teacher: str = FEATURES,
        size: str = "small",
        channels: int | None = None,
        backbone: str = BUNDLED,
        layers: list[str] | None = None,
        weights: str = "bundled",
        top_fraction: float = 0.0,
        map_sizes: Sequence[Sequence[int]] = (),
        in_channels: int = 3,
        image_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__(top_fraction, map_sizes, in_channels, image_size)
        self.kind, self.size, self.backbone = teacher, size, backbone
        self.teacher: Any  # a PyramidTeacher or a PatchTeacher
        if teacher == FEATURES:
            level = backbone, layers, weights, Parameters.strides
            self.teacher = PyramidTeacher(*level, channels, in_channels)
        else:
            self.teacher = PatchTeacher(size, channels or 1, in_channels)
        self.channels, stride = self.teacher.channels, self.teacher.stride
        self.normalisation = self.teacher.normalisation
        self.standardisation = Standardisation(self.channels)
        self.student = patch_description_network(
            size, 2 * self.channels, self.teacher.has_padding, stride, in_channels
        )
        self.autoencoder = Autoencoder(self.channels, stride, in_channels)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments; the weights come from the state dict."""
        layers = self.teacher.pyramid.layers if self.kind == FEATURES else None
        own = {"teacher": self.kind, "size": self.size, "channels": self.channels}
        source = {"backbone": self.backbone, "layers": layers, "weights": "random"}
        return own | source | super().hyperparameters

    def simplify(self) -> None:
        """Fold BatchNorm into the teacher's convolutions."""
        self.teacher.simplify()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The teacher's standardised features (N, C, h, w) of normalised images."""
        return self.standardisation(self.teacher(images))

    def student_features(self, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The student's two halves, each (N, C, *size), of normalised images.

        The first is to be the teacher's features, the second the autoencoder's.
        """
        features = resized(self.student(images), size).float()
        return features[:, : self.channels], features[:, self.channels :]

    def maps(self, images: Tensor) -> list[Tensor]:
        """The squared differences of student and teacher, and of student and autoencoder."""
        images = self.normalisation(as_floats(images, self.in_channels))
        teacher = self.features(images)
        size = (teacher.shape[-2], teacher.shape[-1])
        of_teacher, of_autoencoder = self.student_features(images, size)
        autoencoder = self.autoencoder(images, size).float()
        local = (teacher - of_teacher).square().mean(dim=1)
        whole = (autoencoder - of_autoencoder).square().mean(dim=1)
        return [self._to_the_border(x, images) for x in (local, whole)]

    def _to_the_border(self, maps: Tensor, images: Tensor) -> Tensor:
        """Repeat the outermost values where features without padding do not reach the border."""
        missing = images.shape[-1] // self.teacher.stride - maps.shape[-1]
        if missing <= 0:
            return maps
        before, after = missing // 2, missing - missing // 2
        sides = (before, after, before, after)
        return F.pad(maps[:, None], sides, mode="replicate")[:, 0]
