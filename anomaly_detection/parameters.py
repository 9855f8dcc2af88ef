"""What a model can be told: the typed, strict base of all models' parameters. Imports no PyTorch.

A model's class lists everything that it understands, and a default is what `auto` means for it.
Names that several models share stand in the sections `model` and `training` of params.yaml, as
SHARED has it; what only one model has stands in a section of that model's name.
"""

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
    """What every model can be told; each model derives a class that has more."""

    batch_size: Count = 32
    precision: Precision = "auto"
    seed: Seed = 0

    @property
    def processes(self) -> int:
        """How many processes fit the model together."""
        return 1

    def check(self) -> None:
        """Look for what the values name, such as files, before anything is computed.

        Raises:
            UserError: Something is not there.
        """

    def by_section(self, model: str) -> dict[str, dict[str, Any]]:
        """The values as params.yaml has them, for the model of that name, with nothing `auto`."""
        sections: dict[str, dict[str, Any]] = {"model": {"name": model}, "training": {}}
        for key, value in self.model_dump().items():
            sections.setdefault(section_of(key, model), {})[key] = value
        return sections


class GradientParameters(Parameters):
    """What every model that is trained by gradients can be told; see `BaseTrainer`."""

    num_epochs: Count
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
        """As `num_processes` says."""
        return self.num_processes


def section_of(key: str, model: str) -> str:
    """The section of params.yaml in which a parameter of a model stands."""
    return next((section for section, keys in SHARED.items() if key in keys), model)
