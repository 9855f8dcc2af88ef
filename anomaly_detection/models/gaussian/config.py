"""What the Gaussian model can be told."""

from typing import ClassVar

from anomaly_detection.features.config import PyramidParameters
from anomaly_detection.parameters import Count, Precision, Share


class Parameters(PyramidParameters):
    """Features are computed in float32 unless told otherwise, whatever the hardware has."""

    strides: ClassVar[tuple[int, ...]] = (8, 16, 32)

    precision: Precision = "float32"
    max_channels: Count = 128  # of a level, drawn at random
    shrinkage: Share = 0.2  # of each position's covariance towards the mean one; 1: one for all
