"""STFPM's parameters."""

from typing import Annotated, ClassVar

from pydantic import Field

from anomaly_detection.features.config import PyramidParameters
from anomaly_detection.parameters import Count, GradientParameters, NonNegative, Positive


class Parameters(PyramidParameters, GradientParameters):
    """AdamW, with one cycle of the learning rate over all epochs."""

    strides: ClassVar[tuple[int, ...]] = (8, 16)

    batch_size: Count = 8
    num_epochs: Count = 10
    learning_rate: Positive = 2e-3
    weight_decay: NonNegative = 1e-4
    gradient_checkpointing: bool = False
    hard_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1  # of each image's positions
