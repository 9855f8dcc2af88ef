"""Backbone parameters of models that compare features. Imports no PyTorch."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from anomaly_detection.parameters import Parameters, Share, Text


class PyramidParameters(Parameters):
    """The pretrained backbone, the levels of its features, and how a map becomes a score."""

    strides: ClassVar[tuple[int, ...]]  # levels to use when none are named

    backbone: Text = "tf_efficientnet_lite0"
    layers: Annotated[list[str], Field(min_length=1)] | None = None
    weights: Text = "bundled"
    top_fraction: Share = 0.01

    def check(self) -> None:
        """Raise unless backbone, levels and weights exist.

        The defaults do, so checking them needs no import of timm, which takes seconds.
        """
        chosen = {"backbone", "layers", "weights"} & self.model_fields_set
        if any(getattr(self, key) != type(self).model_fields[key].default for key in chosen):
            from anomaly_detection.features.pyramid import check_backbone

            check_backbone(self.backbone, self.layers, self.weights, self.strides)

    def files(self) -> list[Path]:
        """The weights, if they are a file."""
        path = Path(self.weights)
        return [path] if path.is_file() else []
