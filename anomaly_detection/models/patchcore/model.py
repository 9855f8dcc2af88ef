"""PatchCore: a memory bank of normal patches (Roth et al., CVPR 2022, arXiv:2106.08265).

The bank holds a pretrained backbone's features of patches of normal images. A new patch is as
anomalous as it is far from the nearest one in the bank. Nothing is trained by gradients.

Three things differ from the paper. A patch's own features weigh more than its neighbours'. The
distance is not Euclidean but that of `metric`: directions in which a normal patch is far from its
nearest one in another image anyway count less. And the image score is that of `ScaledMapModel`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomaly_detection.features.cache import Features
from anomaly_detection.models.maps import resize_maps, with_neighbours
from anomaly_detection.models.patchcore.config import Parameters
from anomaly_detection.models.pyramid import PyramidModel

CHUNK_SIZE = 1024  # patches of the bank that are compared at a time
NUM_CANDIDATES = 3  # whose distances are computed exactly


def join_levels(features: Features) -> Tensor:
    """The features of each patch `with_neighbours`: all levels at the finest one's size.

    Args:
        features: Maps (N, C, H, W), the finest first.

    Returns:
        float32, (N, sum of C, H, W), with the finest level's H and W.
    """
    pooled = [with_neighbours(level.float()) for level in features.values()]
    height, width = pooled[0].shape[-2:]
    return torch.cat([resize_maps(level, (height, width)) for level in pooled], dim=1)


def image_names(batch: dict[str, Any]) -> list[str]:
    """What tells the image of each item: its file's hash, which its tiles share, or its pixels'."""
    if "sha256" in batch:
        return list(batch["sha256"])
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch["image"].cpu()]


def nearest_distances(patches: Tensor, bank: Tensor) -> Tensor:
    """Euclidean distance of each patch from the nearest one in the bank."""
    return torch.linalg.vector_norm(patches - bank[nearest(patches, bank)], dim=1)


def nearest(patches: Tensor, bank: Tensor) -> Tensor:
    """The index in the bank of each patch's nearest one.

    A matrix product finds candidates, through |a - b|^2 = |a|^2 - 2ab + |b|^2. That cancels where a
    is near b, so the candidates' distances are computed again from a - b.

    Args:
        patches: float32, (n, C).
        bank: float32, (m, C).

    Returns:
        int64, (n,). The largest thing in memory is n x max(`CHUNK_SIZE`, C) numbers.
    """
    centre = bank.mean(dim=0)  # a common offset of all features would cancel as well
    centred, others = patches - centre, bank - centre
    values, indices = [], []
    for start in range(0, bank.shape[0], CHUNK_SIZE):
        chunk = others[start : start + CHUNK_SIZE]
        # Half the squared distance, less |a|^2 / 2, which is the same for the whole bank.
        half = 0.5 * chunk.square().sum(dim=1)
        near = torch.addmm(half, centred, chunk.T, alpha=-1)
        best = near.topk(min(NUM_CANDIDATES, chunk.shape[0]), largest=False)
        values.append(best.values)
        indices.append(best.indices + start)
    best = torch.cat(values, dim=1).topk(min(NUM_CANDIDATES, bank.shape[0]), largest=False)
    candidates = torch.cat(indices, dim=1).gather(1, best.indices)
    distances = [
        torch.linalg.vector_norm(patches - bank[index], dim=1) for index in candidates.unbind(dim=1)
    ]
    first = torch.stack(distances).argmin(dim=0)
    return candidates.gather(1, first[:, None])[:, 0]


class PatchCoreModel(PyramidModel):
    """Backbone and bank.

    Args:
        *args: As in `PyramidModel`.
        bank_shape: That of `bank`, for a model that is to load a state dict.
        **options: As in `PyramidModel`.

    Attributes:
        bank: float32, (patches, C); the fit fills it with features times `metric`.
        metric: float32, (C, C): distances are Euclidean after features are multiplied by it.
        owners: The names of the images that the bank's patches come from, until the model is saved.
    """

    strides = Parameters.strides
    fits_validation = True
    bank: Tensor
    metric: Tensor

    def __init__(self, *args: Any, bank_shape: Sequence[int] = (0, 0), **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("bank", torch.zeros(*bank_shape))
        self.register_buffer("metric", torch.eye(sum(self.teacher_model.num_channels)))
        self.owners: Sequence[str] = ()

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().hyperparameters | {"bank_shape": list(self.bank.shape)}

    def extract(self, images: Tensor) -> Tensor:
        """Patch features (N, C, H, W), at the finest level's size, before `metric`."""
        return join_levels(self.teacher_model(self.normalised(images)))

    def patches(self, images: Tensor) -> Tensor:
        """The features of each image's patches, (N, P, C), row by row."""
        return self.extract(images).permute(0, 2, 3, 1).flatten(1, 2)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The distances (N, H, W) of all levels together."""
        features = self.extract(images)
        num_images, num_channels, height, width = features.shape
        patches = features.permute(0, 2, 3, 1).reshape(-1, num_channels)
        with torch.autocast(images.device.type, enabled=False):  # 16 bits would find others
            distances = nearest_distances(patches @ self.metric, self.bank)
        return [distances.view(num_images, height, width)]

    def held_out_maps(self, batch: dict[str, Any], device: torch.device) -> list[Tensor]:
        """The distances from the patches of other images."""
        if not self.owners:
            return super().held_out_maps(batch, device)
        features = self.extract(batch["image"].to(device))
        patches = features.permute(0, 2, 3, 1).flatten(1, 2) @ self.metric
        owners = np.array(self.owners)
        distances = []
        for name, own in zip(image_names(batch), patches, strict=True):
            others = self.bank[torch.from_numpy(owners != name).to(device)]
            distances.append(nearest_distances(own, others if len(others) else self.bank))
        return [torch.stack(distances).view(-1, *features.shape[-2:])]
