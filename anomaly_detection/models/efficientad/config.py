"""EfficientAD's parameters."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from anomaly_detection.features.config import PyramidParameters
from anomaly_detection.parameters import Count, GradientParameters, NonNegative, Positive, Text

FEATURES = "features"
DISTILLED = "distilled"
PATCHES = "patches"  # in the model itself: a patch description network, wherever it is from


class Parameters(PyramidParameters, GradientParameters):
    """The paper's, but for the teacher and the number of steps."""

    strides: ClassVar[tuple[int, ...]] = (8,)

    layers: Annotated[list[str], Field(min_length=1, max_length=1)] | None = None
    top_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    batch_size: Count = 1
    learning_rate: Positive = 1e-4
    weight_decay: NonNegative = 1e-5
    teacher: Text = FEATURES
    size: Literal["small", "medium"] = "small"
    channels: Count | None = None
    num_steps: Count = 2000
    distillation_steps: Count = 3000

    def check(self) -> None:
        """Raise unless backbone, level, its channels, weights and teacher exist."""
        super().check()
        if self.teacher in (FEATURES, DISTILLED) and self.channels is None:
            return
        from anomaly_detection.models.efficientad.teachers import PyramidTeacher, read_teacher

        if self.teacher in (FEATURES, DISTILLED):
            PyramidTeacher(self.backbone, self.layers, "random", self.strides, self.channels)
        else:
            read_teacher(Path(self.teacher))

    def pretraining(self) -> dict[str, Any]:
        """What decides the distilled teacher, if there is to be one."""
        if self.teacher != DISTILLED:
            return {}
        names = {"backbone", "layers", "weights", "size", "channels", "distillation_steps"}
        return self.model_dump(include=names | {"precision", "seed"})

    def files(self) -> list[Path]:
        """The backbone's weights and the teacher, if they are files."""
        teacher = Path(self.teacher)
        return [*super().files(), *([teacher] if teacher.is_file() else [])]
