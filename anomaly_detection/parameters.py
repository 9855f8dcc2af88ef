"""The typed, strict base class of all models' parameters. Imports no PyTorch.

A model's class lists every parameter that it has, and its defaults are what `auto` means for it.
Names that several models share are in the sections `model` and `training` of params.yaml, as
listed in SHARED; those of a single model are in a section with that model's name.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

SHARED = {
    "model": ("backbone", "layers", "weights", "top_fraction"),
    "training": (
        "num_epochs",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "early_stopping_patience",
        "precision",
        "accumulate_batches",
        "gradient_checkpointing",
        "num_processes",
        "seed",
    ),
}
AUTO = "auto"

Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Text = Annotated[str, Field(min_length=1)]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A mapping in params.yaml: unknown keys and implicit conversions are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Parameters(Section):
    """Parameters of every model; each model's subclass adds its own."""

    batch_size: Count = 32
    precision: Precision = "auto"
    seed: Seed = 0

    @property
    def processes(self) -> int:
        """How many processes fit the model."""
        return 1

    def check(self) -> None:
        """Check that what the values name, such as files, exists before anything is computed.

        Raises:
            UserError: Something does not exist.
        """

    def files(self) -> list[Path]:
        """The files that the values name, on whose contents the fit depends."""
        return []

    def pretraining(self) -> dict[str, Any]:
        """What decides the result of the model's `pretrain`; empty if there is nothing to do."""
        return {}

    def parts(self) -> list[str]:
        """The names of other models that this one is made of, on whose code the fit depends."""
        return []

    def by_section(self, model: str) -> dict[str, dict[str, Any]]:
        """The values by section of params.yaml, for the model of that name."""
        sections: dict[str, dict[str, Any]] = {"model": {"name": model}, "training": {}}
        for key, value in self.model_dump().items():
            sections.setdefault(section_of(key, model), {})[key] = value
        return sections


class GradientParameters(Parameters):
    """Parameters of every model trained by gradient descent; see `BaseTrainer`."""

    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    early_stopping_patience: Count | None = None
    accumulate_batches: Count = 1
    num_processes: Count = 1

    @field_validator("num_processes")
    @classmethod
    def _divides_the_batch(cls, processes: int, info: ValidationInfo) -> int:
        if info.data.get("batch_size", processes) % processes:
            raise ValueError("must divide training.batch_size")
        return processes

    @property
    def processes(self) -> int:
        """`num_processes`."""
        return self.num_processes


def section_of(key: str, model: str) -> str:
    """The section of params.yaml that holds a model's parameter."""
    return next((section for section, keys in SHARED.items() if key in keys), model)
