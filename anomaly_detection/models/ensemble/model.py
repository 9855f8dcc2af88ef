"""Several models as one: the mean of their maps, each standardised by held-out normal images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_detection.models import spec
from anomaly_detection.models.contract import AnomalyModel
from anomaly_detection.models.fusion import ScaledMapModel


class EnsembleModel(ScaledMapModel):
    """Any models that give anomaly maps.

    Args:
        members: By name, the models, or their `hyperparameters` for loading a state dict.
        top_fraction: As in `ScaledMapModel`.
        map_sizes: As in `ScaledMapModel`.
        in_channels: As in `ScaledMapModel`.
        image_size: As in `ScaledMapModel`.
    """

    members: Any  # a ModuleDict of AnomalyModel; nn.Module does not declare what its items have

    def __init__(
        self,
        members: Mapping[str, AnomalyModel | dict[str, Any]],
        top_fraction: float = 0.0,
        map_sizes: Sequence[Sequence[int]] = (),
        in_channels: int = 3,
        image_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__(top_fraction, map_sizes, in_channels, image_size)
        self.members = nn.ModuleDict(
            {
                name: member if isinstance(member, nn.Module) else spec(name).model(**member)
                for name, member in members.items()
            }
        )

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments."""
        members = {name: member.hyperparameters for name, member in self.members.items()}
        return {"members": members} | super().hyperparameters

    def simplify(self) -> None:
        """Simplify each member."""
        for member in self.members.values():
            member.simplify()

    def maps(self, images: Tensor) -> list[Tensor]:
        """Each member's map, at the images' size."""
        return [member(images)["anomaly_map"][:, 0] for member in self.members.values()]

    def held_out_maps(self, batch: dict[str, Any], device: torch.device) -> list[Tensor]:
        """Each member's map as if it had not seen the images."""
        return [member.held_out_map(batch, device)[:, 0] for member in self.members.values()]
