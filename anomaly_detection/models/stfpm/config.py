"""STFPM's parameters."""

from typing import Annotated, ClassVar

from pydantic import Field

from anomaly_detection.features.config import PyramidParameters
from anomaly_detection.parameters import Count, GradientParameters, NonNegative, Positive


class Parameters(PyramidParameters, GradientParameters):
    """The paper's values, except for fewer epochs and early stopping."""

    strides: ClassVar[tuple[int, ...]] = (4, 8, 16)

    num_epochs: Count = 20
    learning_rate: Positive = 0.4
    weight_decay: NonNegative = 1e-4
    early_stopping_patience: Count | None = 5
    gradient_checkpointing: bool = False
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # SGD's
