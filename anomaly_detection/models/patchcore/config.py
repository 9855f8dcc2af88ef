"""What PatchCore can be told."""

from typing import ClassVar

from pydantic import ValidationInfo, field_validator

from anomaly_detection.features.config import PyramidParameters
from anomaly_detection.parameters import Count, Precision


class Parameters(PyramidParameters):
    """The bank's size sets the time of inference; `max_patches`, the time and memory of the fit.

    Features are computed in float32 unless told otherwise, also where the hardware has 16 bits.
    """

    strides: ClassVar[tuple[int, ...]] = (8, 16)

    precision: Precision = "float32"

    max_patches: Count = 131072  # drawn from the candidates of all images
    bank_size: Count = 8192  # chosen from these to be far apart

    @field_validator("bank_size")
    @classmethod
    def _is_a_part(cls, bank_size: int, info: ValidationInfo) -> int:
        if bank_size > info.data.get("max_patches", bank_size):
            raise ValueError("must be at most patchcore.max_patches")
        return bank_size
