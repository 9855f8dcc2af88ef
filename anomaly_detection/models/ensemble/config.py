"""The ensemble's parameters."""

from typing import ClassVar

from pydantic import Field, field_validator

from anomaly_detection import models
from anomaly_detection.features.config import PyramidParameters
from anomaly_detection.parameters import Parameters as AnyParameters
from anomaly_detection.parameters import Precision


class Parameters(PyramidParameters):
    """Each member gets the values below, and has its own defaults for everything else."""

    strides: ClassVar[tuple[int, ...]] = ()  # each member's own

    precision: Precision = "float32"
    members: list[str] = Field(["gaussian", "patchcore"], min_length=1)

    @field_validator("members")
    @classmethod
    def _are_other_models(cls, members: list[str]) -> list[str]:
        own = __name__.split(".")[-2]
        there = [name for name in models.names() if name != own]
        if len(set(members)) < len(members) or not set(members) <= set(there):
            raise ValueError(f"must be different models of {', '.join(there)}")
        return members

    def of_members(self) -> dict[str, AnyParameters]:
        """The parameters of each member, by its name."""
        classes = {name: models.parameters(name) for name in self.members}
        values = self.model_dump(exclude={"members"})
        return {
            name: cls(**{key: value for key, value in values.items() if key in cls.model_fields})
            for name, cls in classes.items()
        }

    def parts(self) -> list[str]:
        """The members."""
        return self.members

    def check(self) -> None:
        """Check each member's."""
        for parameters in self.of_members().values():
            parameters.check()
