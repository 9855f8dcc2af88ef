"""STFPM: student-teacher feature pyramid matching (Wang et al., BMVC 2021, arXiv:2103.04257).

A student learns to reproduce a frozen, pretrained teacher's features on normal images. Where it
fails on a new image, the image is anomalous.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_detection.backbones import BUNDLED, FeaturePyramid

Features = dict[str, Tensor]


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
        """A scalar that depends on the batch's size only through its images."""
        return self.per_image(teacher, student).mean()

    def per_image(self, teacher: Features, student: Features) -> Tensor:
        """The same for each image: (N,)."""
        return sum(feature_distance(teacher[x], student[x]).mean(dim=(1, 2)) for x in teacher)


class AnomalyMapGenerator(nn.Module):
    """Product over levels of the distances (eq. 4), brought to the image's size."""

    def forward(self, teacher: Features, student: Features, image_size: tuple[int, int]) -> Tensor:
        """Anomaly maps (N, 1, H, W) for images of H x W pixels.

        The levels are multiplied at the finest one's size and the product is enlarged once.
        """
        distances = [feature_distance(teacher[x], student[x])[:, None] for x in teacher]
        finest = max((tuple(d.shape[-2:]) for d in distances), key=math.prod)
        product = math.prod(_resize(distance, finest) for distance in distances)
        return _resize(product, image_size)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class STFPMModel(nn.Module):
    """Teacher and student, from images to features (training) or scores and maps (inference).

    Args:
        backbone: timm model of both.
        layers: Levels to compare; None for those at strides 4, 8 and 16.
        weights: The teacher's, as in `FeaturePyramid`. The student always starts at random.
        top_fraction: The image score is the mean of this share of the map's highest values, in
            [0, 1]: 0 is the maximum, 1 the mean.

    The teacher is frozen: no gradients, and always in eval mode. Images are uint8 or floats in
    [0, 1], RGB; normalisation is a part of the model.
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
        self.teacher = FeaturePyramid(backbone, layers, weights).eval().requires_grad_(False)
        self.student = FeaturePyramid(backbone, layers)
        self.top_fraction = top_fraction
        self.map_generator = AnomalyMapGenerator()
        self.hyperparameters: dict[str, Any] = {
            "name": "stfpm",
            "backbone": backbone,
            "layers": self.teacher.layers,
            "top_fraction": top_fraction,
        }
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.teacher, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values)

    def train(self, mode: bool = True) -> "STFPMModel":
        """Set the student's mode; the teacher's BatchNorm stays asleep."""
        super().train(mode)
        self.teacher.eval()
        return self

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Trade time for memory in the student; see `FeaturePyramid`."""
        self.student.set_gradient_checkpointing(enable)

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalised float images, of uint8 or floats in [0, 1], shape (N, 3, H, W)."""
        if not images.is_floating_point():
            images = images.to(self.mean.dtype) / 255
        normalised = (images - self.mean) / self.std
        return normalised.contiguous(memory_format=torch.channels_last)

    def extract(self, images: Tensor, teacher: Features | None = None) -> tuple[Features, Features]:
        """The teacher's features, computed unless they are given, and the student's."""
        images = self.preprocess(images)
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
        return {"pred_score": self.score(anomaly_map), "anomaly_map": anomaly_map}

    def score(self, anomaly_map: Tensor) -> Tensor:
        """Image scores (N,) of maps (N, 1, H, W)."""
        pixels = anomaly_map.flatten(1)
        count = max(1, round(self.top_fraction * pixels.shape[1]))
        return pixels.topk(count, sorted=False).values.mean(dim=1)
