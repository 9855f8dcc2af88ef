"""STFPM: student-teacher feature pyramid matching (Wang et al., BMVC 2021, arXiv:2103.04257).

A student learns to reproduce a frozen, pretrained teacher's features on normal images. Where it
fails on a new image, that region is anomalous.

Five things differ from the paper. The teacher's channels are standardised, so that the loud ones do
not decide alone. Features are compared as they are, not as unit vectors. The student has a 1 x 1
convolution at each level, so that it can give such signed features. The loss takes the hardest
positions of each image (as EfficientAD does, arXiv:2303.14535, section 3.2). And the levels' maps
are standardised and averaged (see `ScaledMapModel`) instead of multiplied.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_detection.features.cache import Features
from anomaly_detection.features.images import check_images
from anomaly_detection.features.pyramid import FeaturePyramid, available_levels
from anomaly_detection.features.standardisation import Standardisation
from anomaly_detection.features.weights import LOCAL
from anomaly_detection.models.maps import resize_maps
from anomaly_detection.models.pyramid import PyramidModel
from anomaly_detection.models.stfpm.config import Parameters
from anomaly_detection.trainer import count_batch_norm_once

PAPER = ("layer1", "layer2", "layer3")  # levels of a ResNet


def feature_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """The mean over channels of the squared differences.

    Equation 1 compares unit vectors. Those turn the faint noise of a plain background into large
    angles, and a part in front of it is lost.

    Args:
        teacher: Feature map of shape (N, C, H, W).
        student: Feature map of the same shape.

    Returns:
        float32 distances of shape (N, H, W), at least 0.

    Raises:
        ValueError: The shapes differ.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            "teacher and student must have the same shape, "
            f"got {tuple(teacher.shape)} and {tuple(student.shape)}."
        )
    return (teacher.float() - student.float()).square().mean(dim=1)


class STFPMLoss(nn.Module):
    """Sum over levels of the mean distance over batch and positions (eqs. 2 and 3).

    Args:
        hard_fraction: Share of each image's positions that count, those with the largest distances,
            in (0, 1]; 1 is the paper's.
    """

    def __init__(self, hard_fraction: float = 1.0) -> None:
        super().__init__()
        self.hard_fraction = hard_fraction

    def forward(self, teacher_features: Features, student_features: Features) -> Tensor:
        """The loss as a scalar that does not depend on the batch size."""
        return self.per_image(teacher_features, student_features).mean()

    def per_image(self, teacher_features: Features, student_features: Features) -> Tensor:
        """The loss of each image: (N,)."""
        levels = ((level, student_features[name]) for name, level in teacher_features.items())
        return reduce(torch.add, (self._hardest(*level) for level in levels))

    def _hardest(self, teacher: Tensor, student: Tensor) -> Tensor:
        distances = feature_distance(teacher, student).flatten(1)
        if self.hard_fraction < 1:
            count = max(1, round(self.hard_fraction * distances.shape[1]))
            distances = distances.topk(count, sorted=False).values
        return distances.mean(dim=1)


def compute_anomaly_map(
    teacher_features: Features, student_features: Features, image_size: Sequence[int]
) -> Tensor:
    """The mean of the levels' maps, each resized to the image: (N, 1, H, W), at least 0.

    A fitted model first brings the levels to one scale; see `ScaledMapModel`.

    Args:
        teacher_features: Maps (N, C, h, w) by level.
        student_features: The same levels.
        image_size: H and W.
    """
    height, width = image_size
    maps = level_maps(teacher_features, student_features)
    return torch.stack([resize_maps(x[:, None], (height, width)) for x in maps]).mean(dim=0)


def level_maps(teacher_features: Features, student_features: Features) -> list[Tensor]:
    """The root mean squared difference at each level, (N, h, w)."""
    levels = ((level, student_features[name]) for name, level in teacher_features.items())
    return [feature_distance(*level).sqrt() for level in levels]


class AnomalyMapGenerator(nn.Module):
    """`compute_anomaly_map` as a module."""

    def forward(
        self, teacher_features: Features, student_features: Features, image_size: Sequence[int]
    ) -> Tensor:
        """The anomaly map (N, 1, H, W)."""
        return compute_anomaly_map(teacher_features, student_features, image_size)


class Student(nn.Module):
    """The teacher's architecture, untrained, with a 1 x 1 convolution at each level.

    Args:
        backbone: timm model.
        layers: Levels, by timm's names.
        in_channels: Of the images.
    """

    def __init__(self, backbone: str, layers: list[str], in_channels: int = 3) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(backbone, layers, in_channels=in_channels)
        self.heads = nn.ModuleList(nn.Conv2d(c, c, 1) for c in self.pyramid.num_channels)

    def forward(self, images: Tensor) -> Features:
        """Features of normalised images, by level."""
        features = self.pyramid(images)
        return {x: head(features[x]) for x, head in zip(features, self.heads, strict=True)}


class STFPMModel(PyramidModel):
    """Teacher and student, from images to features (training) or scores and maps (inference).

    Args:
        backbone: timm model.
        layers: Levels to use, by timm's names; None for those at strides 8 and 16. The default is
            the paper's, or None for a backbone that has no levels of these names.
        weights: The teacher's, as in `FeaturePyramid`; the student starts at random.
        **options: As in `PyramidModel`.

    Attributes:
        backbone, layers: What was asked for.
        teacher_model: Frozen, in eval mode.
        student_model: Trainable.
    """

    strides = Parameters.strides
    standardisations: Any  # a ModuleList of Standardisation

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] | None = PAPER,
        weights: str = LOCAL,
        **options: Any,
    ) -> None:
        if layers is PAPER and not available_levels(backbone).keys() >= set(PAPER):
            layers = None
        super().__init__(backbone, layers, weights, **options)
        self.student_model = Student(backbone, self.teacher_model.layers, self.in_channels)
        self.standardisations = nn.ModuleList(map(Standardisation, self.teacher_model.num_channels))
        self.map_generator = AnomalyMapGenerator()

    def simplify(self) -> None:
        """Fold BatchNorm into the convolutions."""
        super().simplify()
        self.student_model.pyramid.fold_batch_norm()

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Trade time for memory in the student; see `FeaturePyramid`."""
        self.student_model.pyramid.set_gradient_checkpointing(enable)
        count_batch_norm_once(self.student_model)

    def extract(self, images: Tensor, teacher: Features | None = None) -> tuple[Features, Features]:
        """The teacher's standardised features and the student's.

        Args:
            images: Shape (N, C, H, W).
            teacher: The teacher's features before standardising, if they are known already.
        """
        images = self.normalised(images)
        if teacher is None:
            with torch.no_grad():
                teacher = self.teacher_model(images)
        levels = zip(teacher, self.standardisations, strict=True)
        return {x: standardise(teacher[x]) for x, standardise in levels}, self.student_model(images)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The distances at each level."""
        return level_maps(*self.extract(images))

    def forward(
        self, images: Tensor, *further: Tensor
    ) -> tuple[Features, Features] | dict[str, Tensor]:
        """Features when training, else `pred_score` (N,) and `anomaly_map` (N, 1, H, W).

        Before `standardise` has been called, the map is that of `compute_anomaly_map`.
        """
        if self.training:
            return self.extract(images)
        if self.scales:
            return super().forward(images, *further)
        check_images(images, self.in_channels, self.image_size)
        return self.scored(self.map_generator(*self.extract(images), images.shape[-2:]), images)
