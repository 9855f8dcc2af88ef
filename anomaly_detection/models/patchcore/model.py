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
    """As `nearest_in_banks`, of patches (n, C) in one bank (m, C)."""
    return nearest_in_banks(patches[None], bank[None])[0]


def nearest_in_banks(patches: Tensor, banks: Tensor) -> Tensor:
    """Euclidean distance of each patch from the nearest one in its bank.

    A matrix product finds the candidates, through |a - b|^2 = |a|^2 - 2ab + |b|^2. That cancels
    where a is near b, so the candidates' distances are computed again from a - b.

    Args:
        patches: float32, (B, n, C).
        banks: float32, (B, m, C), each for the patches in the same place.

    Returns:
        (B, n). The largest thing in memory is B x n x max(`CHUNK_SIZE`, C) numbers.
    """
    size = banks.shape[1]
    centre = banks.mean(dim=1, keepdim=True)  # a common offset of all features would cancel as well
    centred, others = patches - centre, banks - centre
    values, indices = [], []
    for start in range(0, size, CHUNK_SIZE):
        chunk = others[:, start : start + CHUNK_SIZE]
        # Half the squared distance, less |a|^2 / 2, which is the same for the whole bank.
        half = 0.5 * chunk.square().sum(dim=2)[:, None]
        near = torch.baddbmm(half, centred, chunk.mT, alpha=-1)
        best = near.topk(min(NUM_CANDIDATES, chunk.shape[1]), largest=False)
        values.append(best.values)
        indices.append(best.indices + start)
    best = torch.cat(values, dim=2).topk(min(NUM_CANDIDATES, size), largest=False)
    candidates = torch.cat(indices, dim=2).gather(2, best.indices)
    first = size * torch.arange(banks.shape[0], device=banks.device)[:, None]  # of each bank
    distances = [
        torch.linalg.vector_norm(patches - banks.flatten(0, 1)[first + index], dim=2)
        for index in candidates.unbind(dim=2)
    ]
    return torch.stack(distances).amin(dim=0)


class PatchCoreModel(PyramidModel):
    """Backbone and bank.

    The paper's image score weights the highest distance by how usual its neighbour is in the bank;
    here it is that of `PyramidModel`.

    Args:
        *args: As in `PyramidModel`.
        bank_shape: That of `bank`, for a model that is to load a state dict.
        **options: As in `PyramidModel`.

    Attributes:
        bank: float32, (patches, C), or (positions, patches, C) if tiles in different positions are
            compared with different patches; the fit fills it.
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

    @property
    def inputs(self) -> Sequence[str]:
        """The images, and the positions of tiles if each has a bank of its own."""
        return ("image", "position") if self.bank.dim() == 3 else ("image",)

    def extract(self, images: Tensor) -> Tensor:
        """Patch features (N, C, H, W), at the finest level's size."""
        return join_levels(self.teacher_model(self.normalised(images)))

    def maps(self, images: Tensor, *further: Tensor) -> list[Tensor]:
        """The distances (N, H, W) of all levels together."""
        features = self.extract(images)
        num_images, num_channels, height, width = features.shape
        patches = features.permute(0, 2, 3, 1).reshape(num_images, -1, num_channels)
        with torch.autocast(images.device.type, enabled=False):  # 16 bits would find others
            if further:
                distances = nearest_in_banks(patches, self.bank[further[0]])
            else:
                distances = nearest_distances(patches.flatten(0, 1), self.bank)
        return [distances.view(num_images, height, width)]
