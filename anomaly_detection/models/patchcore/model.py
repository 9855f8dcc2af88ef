"""PatchCore: a memory bank of normal patches (Roth et al., CVPR 2022, arXiv:2106.08265).

The bank holds a pretrained backbone's features of patches of normal images. A new patch is as
anomalous as it is far from the nearest one in the bank. Nothing is trained by gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_detection.features.cache import Features
from anomaly_detection.features.pyramid import FeaturePyramid
from anomaly_detection.features.weights import BUNDLED
from anomaly_detection.models.contract import AnomalyModel
from anomaly_detection.models.maps import image_scores, resize_maps
from anomaly_detection.models.patchcore.config import Parameters
from anomaly_detection.trainer import TrainingError

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
    pooled = [
        F.avg_pool2d(level.float(), 3, stride=1, padding=1, count_include_pad=False)
        for level in features.values()
    ]
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


class PatchCoreModel(AnomalyModel):
    """Backbone and bank, from images to patch features (training) or scores and maps (inference).

    Args:
        backbone: timm model.
        layers: Levels to use; None for those at strides 8 and 16.
        weights: The backbone's, as in `FeaturePyramid`.
        top_fraction: The image score is the mean of this share of the map's highest values, in
            [0, 1]: 0 is the maximum, 1 the mean. (The paper weights the maximum by how usual its
            neighbour is in the bank; that is left out.)
        bank_shape: Number of patches and channels, for a model that is to load a state dict.

    The backbone is frozen: no gradients, and always in eval mode. Images are uint8 or floats in
    [0, 1], RGB; normalisation is a part of the model.

    Attributes:
        bank: float32, (patches, C); the fit fills it.
    """

    bank: Tensor

    def __init__(
        self,
        backbone: str = BUNDLED,
        layers: list[str] | None = None,
        weights: str = "bundled",
        top_fraction: float = 0.0,
        bank_shape: Sequence[int] = (0, 0),
    ) -> None:
        super().__init__()
        if not 0 <= top_fraction <= 1:
            raise ValueError(f"top_fraction must be in [0, 1], got {top_fraction}.")
        self.pyramid = FeaturePyramid(backbone, layers, weights, Parameters.strides).freeze()
        self.normalisation = self.pyramid.normalisation
        self.backbone = backbone
        self.top_fraction = top_fraction
        self.register_buffer("bank", torch.zeros(*bank_shape))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments; weights and bank come from the state dict."""
        return {
            "backbone": self.backbone,
            "layers": self.pyramid.layers,
            "weights": "random",
            "top_fraction": self.top_fraction,
            "bank_shape": list(self.bank.shape),
        }

    def simplify(self) -> None:
        """Fold BatchNorm into the convolutions."""
        self.pyramid.fold_batch_norm()

    def extract(self, images: Tensor) -> Tensor:
        """Patch features (N, C, H, W), at the finest level's size."""
        return join_levels(self.pyramid(self.normalisation(images)))

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Patch features when training, else `pred_score` (N,) and `anomaly_map` (N, 1, H, W).

        Raises:
            TrainingError: The bank is empty.
        """
        features = self.extract(images)
        if self.training:
            return features
        if len(self.bank) == 0:
            raise TrainingError(
                "the memory bank must be filled before images can be scored, got an empty one; "
                "fit the model."
            )
        num_images, num_channels, height, width = features.shape
        patches = features.permute(0, 2, 3, 1).reshape(-1, num_channels)
        with torch.autocast(images.device.type, enabled=False):  # 16 bits would find others
            distances = nearest_distances(patches, self.bank)
        anomaly_map = distances.view(num_images, 1, height, width)
        anomaly_map = resize_maps(anomaly_map, (images.shape[-2], images.shape[-1]))
        return {
            "pred_score": image_scores(anomaly_map, self.top_fraction),
            "anomaly_map": anomaly_map,
        }
