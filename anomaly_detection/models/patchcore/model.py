"""PatchCore: a memory bank of normal patches (Roth et al., CVPR 2022, arXiv:2106.08265).

The bank holds a pretrained backbone's features of patches of normal images. A new patch is as
anomalous as it is far from the nearest one in the bank. Nothing is trained by gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anomaly_detection.features.cache import Features
from anomaly_detection.models.maps import mean_of_neighbours, resize_maps
from anomaly_detection.models.patchcore.config import Parameters
from anomaly_detection.models.pyramid import PyramidModel

CHUNK_SIZE = 1024  # patches of the bank that are compared at a time
NUM_CANDIDATES = 3  # whose distances are computed exactly


def join_levels(features: Features) -> Tensor:
    """The features of each patch and its neighbours: all levels at the finest one's size.

    Each position becomes the mean over the 3 x 3 around it, of which only those in the image count
    (the paper's p = 3).

    Args:
        features: Maps (N, C, H, W), the finest first.

    Returns:
        float32, (N, sum of C, H, W), with the finest level's H and W.
    """
    pooled = [mean_of_neighbours(level.float()) for level in features.values()]
    height, width = pooled[0].shape[-2:]
    return torch.cat([resize_maps(level, (height, width)) for level in pooled], dim=1)


def nearest_distances(patches: Tensor, bank: Tensor) -> Tensor:
    """Euclidean distance of each patch from the nearest one in the bank.

    A matrix product finds the candidates, through |a - b|^2 = |a|^2 - 2ab + |b|^2. That cancels
    where a is near b, so the candidates' distances are computed again from a - b.

    Args:
        patches: float32, (n, C).
        bank: float32, (m, C).

    Returns:
        (n,). The largest thing in memory is n x max(`CHUNK_SIZE`, C) numbers.
    """
    centre = bank.mean(dim=0)  # a common offset of all features would cancel as well
    centred, others = patches - centre, bank - centre
    values, indices = [], []
    for start in range(0, len(bank), CHUNK_SIZE):
        chunk = others[start : start + CHUNK_SIZE]
        # Half the squared distance, less |a|^2 / 2, which is the same for the whole bank.
        near = torch.addmm(0.5 * chunk.square().sum(dim=1), centred, chunk.T, alpha=-1)
        best = near.topk(min(NUM_CANDIDATES, len(chunk)), largest=False)
        values.append(best.values)
        indices.append(best.indices + start)
    best = torch.cat(values, dim=1).topk(min(NUM_CANDIDATES, len(bank)), largest=False)
    candidates = torch.cat(indices, dim=1).gather(1, best.indices)
    distances = [
        torch.linalg.vector_norm(patches - bank[index], dim=1) for index in candidates.unbind(dim=1)
    ]
    return torch.stack(distances).amin(dim=0)


class PatchCoreModel(PyramidModel):
    """Backbone and bank.

    The paper's image score weights the highest distance by how usual its neighbour is in the bank;
    here it is that of `PyramidModel`.

    Args:
        *args: As in `PyramidModel`.
        bank_shape: Number of patches and channels, for a model that is to load a state dict.
        **options: As in `PyramidModel`.

    Attributes:
        bank: float32, (patches, C); the fit fills it.
    """

    strides = Parameters.strides
    bank: Tensor

    def __init__(self, *args: Any, bank_shape: Sequence[int] = (0, 0), **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("bank", torch.zeros(*bank_shape))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().hyperparameters | {"bank_shape": list(self.bank.shape)}

    def extract(self, images: Tensor) -> Tensor:
        """Patch features (N, C, H, W), at the finest level's size."""
        return join_levels(self.teacher(self.normalisation(images)))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The distances (N, H, W) of all levels together."""
        features = self.extract(images)
        num_images, num_channels, height, width = features.shape
        patches = features.permute(0, 2, 3, 1).reshape(-1, num_channels)
        with torch.autocast(images.device.type, enabled=False):  # 16 bits would find others
            distances = nearest_distances(patches, self.bank)
        return [distances.view(num_images, height, width)]
