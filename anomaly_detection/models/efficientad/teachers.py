"""What EfficientAD's student and autoencoder learn to reproduce: features of local patches.

Two kinds of teacher, both frozen: a level of a pretrained backbone, or a patch description network
whose weights come from a file.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from anomaly_detection.features.images import IMAGENET
from anomaly_detection.features.pyramid import FeaturePyramid, Normalisation
from anomaly_detection.features.weights import BackboneError, read_state_dict
from anomaly_detection.models.efficientad.networks import STRIDE, patch_description_network

LAYERS = {"small": 4, "medium": 6}  # convolutions


class PyramidTeacher(nn.Module):
    """A level of a pretrained backbone, projected to fewer channels.

    Args:
        backbone: As in `FeaturePyramid`, with one level.
        layers: As in `FeaturePyramid`.
        weights: As in `FeaturePyramid`.
        strides: As in `FeaturePyramid`.
        channels: The number of features; None for all of the level's.
        in_channels: As in `FeaturePyramid`.

    Raises:
        BackboneError: The level has fewer channels.
    """

    has_padding = True
    projection: Tensor

    def __init__(
        self,
        backbone: str,
        layers: list[str] | None,
        weights: str,
        strides: tuple[int, ...],
        channels: int | None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(backbone, layers, weights, strides, in_channels).freeze()
        (there,), (self.stride,) = self.pyramid.num_channels, self.pyramid.strides
        self.channels = channels or there
        if self.channels > there:
            raise BackboneError(
                f"efficientad.channels must be at most {there}, the channels of {backbone}'s level "
                f"{self.pyramid.layers[0]}, got {channels}."
            )
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(there, there, generator=generator)).Q
        projection = basis[:, : self.channels] if channels else torch.eye(there)
        self.register_buffer("projection", projection.T[..., None, None].contiguous())

    @property
    def normalisation(self) -> Normalisation:
        """The backbone's."""
        return self.pyramid.normalisation

    def simplify(self) -> None:
        """Fold BatchNorm into the convolutions."""
        self.pyramid.fold_batch_norm()

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, C, H / stride, W / stride) of normalised images."""
        (features,) = self.pyramid(images).values()
        return nn.functional.conv2d(features, self.projection.to(features.dtype))


class PatchTeacher(nn.Module):
    """A patch description network (section 3.1).

    Args:
        size: `small` or `medium`.
        channels: The number of features.
        in_channels: Of the images.
    """

    has_padding = False
    stride = STRIDE

    def __init__(self, size: str, channels: int, in_channels: int = 3) -> None:
        super().__init__()
        self.size, self.channels, self.in_channels = size, channels, in_channels
        net = patch_description_network(size, channels, in_channels=in_channels)
        self.net = net.requires_grad_(False)

    @property
    def normalisation(self) -> Normalisation:
        """That of ImageNet, by which public weights were trained."""
        return Normalisation(*IMAGENET, self.in_channels)

    def simplify(self) -> None:
        """There is nothing to fold."""

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, C, (H - 33) // 4 + 1, (W - 33) // 4 + 1) of normalised images."""
        return self.net(images)


def read_teacher(path: Path) -> PatchTeacher:
    """A patch description network from a file with its state dict.

    The layouts of public implementations are accepted: the convolutions by number (`0.weight`) or
    by name (`conv1.weight`), alone or in the state dict of a whole model, below `teacher`.

    Raises:
        BackboneError: The file is none, or of another network.
    """
    if not path.is_file():
        raise BackboneError(
            f"efficientad.teacher must be features, distilled or a file, got {str(path)!r}, which "
            "is none."
        )
    content = read_state_dict(path, "efficientad.teacher")
    below = [x for name, x in content.items() if "teacher." in name]
    tensors = below or list(content.values())
    size = next((x for x, count in LAYERS.items() if len(tensors) == 2 * count), None)
    if size:
        in_channels = 4 if tensors[0].shape[1:2] == (4,) else 3
        teacher = PatchTeacher(size, len(tensors[-1]), in_channels)
        expected = teacher.net.state_dict()
        if [x.shape for x in tensors] == [x.shape for x in expected.values()]:
            teacher.net.load_state_dict(dict(zip(expected, tensors, strict=True)))
            return teacher
    raise BackboneError(
        f"efficientad.teacher {path} must be the state dict of a patch description network, with "
        "weight and bias of the 4 (small) or 6 (medium) convolutions of EfficientAD's tables 6 and "
        f"7 in their order, got {len(tensors)} tensors: {_shapes(tensors)}."
    )


def _shapes(tensors: list[Tensor]) -> str:
    shown = [" x ".join(map(str, x.shape)) for x in tensors[:4]]
    return ", ".join(shown + ["..."] * (len(tensors) > 4)) or "none"
