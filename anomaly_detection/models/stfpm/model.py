"""STFPM: student-teacher feature pyramid matching (Wang et al., BMVC 2021, arXiv:2103.04257).

A student learns to reproduce a frozen, pretrained teacher's features on normal images. Where it
fails on a new image, that region is anomalous.
"""

import math
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_detection.features.cache import Features
from anomaly_detection.features.pyramid import FeaturePyramid
from anomaly_detection.features.weights import BUNDLED
from anomaly_detection.models.contract import AnomalyModel
from anomaly_detection.models.maps import image_scores, resize_maps
from anomaly_detection.trainer import count_batch_norm_once


def feature_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Half squared distance between unit feature vectors (eq. 1), which is 1 - cosine.

    Args:
        teacher: Feature map of shape (N, C, H, W).
        student: Feature map of the same shape.

    Returns:
        float32 distances of shape (N, H, W) in [0, 2]; 0 where the directions agree.

    Raises:
        ValueError: The shapes differ.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            "teacher and student must have the same shape, "
            f"got {tuple(teacher.shape)} and {tuple(student.shape)}."
        )
    difference = F.normalize(teacher.float(), dim=1) - F.normalize(student.float(), dim=1)
    return 0.5 * difference.square().sum(dim=1)


class STFPMLoss(nn.Module):
    """Sum over levels of the mean distance over batch and positions (eqs. 2 and 3)."""

    def forward(self, teacher: Features, student: Features) -> Tensor:
        """The loss as a scalar that does not depend on the batch size."""
        return self.per_image(teacher, student).mean()

    def per_image(self, teacher: Features, student: Features) -> Tensor:
        """The loss of each image: (N,)."""
        distances = (feature_distance(teacher[x], student[x]).mean(dim=(1, 2)) for x in teacher)
        return reduce(torch.add, distances)


class AnomalyMapGenerator(nn.Module):
    """Product of the distances over levels (eq. 4), resized to the image."""

    def forward(self, teacher: Features, student: Features, image_size: tuple[int, int]) -> Tensor:
        """Anomaly maps (N, 1, H, W) for images of H x W pixels.

        The levels are multiplied at the finest one's size and the product is enlarged once.
        """
        distances = [feature_distance(teacher[x], student[x])[:, None] for x in teacher]
        height, width = max((distance.shape[-2:] for distance in distances), key=math.prod)
        maps = (resize_maps(distance, (height, width)) for distance in distances)
        return resize_maps(reduce(torch.mul, maps), image_size)


class STFPMModel(AnomalyModel):
    """Teacher and student, from images to features (training) or scores and maps (inference).

    Args:
        backbone: timm model used for both.
        layers: Levels to compare; None for those at strides 4, 8 and 16.
        weights: The teacher's, as in `FeaturePyramid`. The student always starts at random.
        top_fraction: The image score is the mean of this share of the map's highest values, in
            [0, 1]: 0 gives the maximum, 1 the mean.

    The teacher is frozen: no gradients, and always in eval mode. Images are uint8 or floats in
    [0, 1], RGB; normalisation is part of the model.
    """

    def __init__(
        self,
        backbone: str = BUNDLED,
        layers: list[str] | None = None,
        weights: str = "bundled",
        top_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= top_fraction <= 1:
            raise ValueError(f"top_fraction must be in [0, 1], got {top_fraction}.")
        self.teacher = FeaturePyramid(backbone, layers, weights).freeze()
        self.student = FeaturePyramid(backbone, layers)
        self.top_fraction = top_fraction
        self.map_generator = AnomalyMapGenerator()
        self.backbone = backbone
        self.normalisation = self.teacher.normalisation

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments; the weights come from the state dict."""
        return {
            "backbone": self.backbone,
            "layers": self.teacher.layers,
            "weights": "random",
            "top_fraction": self.top_fraction,
        }

    def simplify(self) -> None:
        """Fold BatchNorm into the convolutions."""
        self.teacher.fold_batch_norm()
        self.student.fold_batch_norm()

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Trade time for memory in the student; see `FeaturePyramid`."""
        self.student.set_gradient_checkpointing(enable)
        count_batch_norm_once(self.student)

    def extract(self, images: Tensor, teacher: Features | None = None) -> tuple[Features, Features]:
        """The teacher's features, computed unless they are given, and the student's."""
        images = self.normalisation(images)
        if teacher is None:
            with torch.no_grad():
                teacher = self.teacher(images)
        return teacher, self.student(images)

    def forward(self, images: Tensor) -> tuple[Features, Features] | dict[str, Tensor]:
        """Features when training, else `pred_score` (N,) and `anomaly_map` (N, 1, H, W)."""
        teacher, student = self.extract(images)
        if self.training:
            return teacher, student
        anomaly_map = self.map_generator(teacher, student, tuple(images.shape[-2:]))
        score = image_scores(anomaly_map, self.top_fraction)
        return {"pred_score": score, "anomaly_map": anomaly_map}
