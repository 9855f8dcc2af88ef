"""EfficientAD's networks (Batzner et al., WACV 2024, arXiv:2303.14535, appendix, tables 6 to 8)."""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"small": (128, 256), "medium": (256, 512)}  # channels before and after the first pooling
STRIDE = 4  # pixels; distance of the features of a patch description network
RESOLUTIONS = (3, 8, 15, 32, 63, 127)  # of the decoder, for features of 64 x 64 positions


def patch_description_network(
    size: str,
    num_channels: int,
    has_padding: bool = False,
    stride: int = STRIDE,
    in_channels: int = 3,
) -> nn.Sequential:
    """A few convolutions, so that each feature describes a patch of the image alone.

    Args:
        size: `small` (table 6) or `medium` (table 7).
        num_channels: Of the features.
        has_padding: Whether features cover the image up to its border. Without padding, images
            (N, C, H, W) give features ((H - 33) // 4 + 1, (W - 33) // 4 + 1) at stride 4.
        stride: Of the features, in pixels, a multiple of 4. At 4, the paper's, they see 33 x 33
            pixels; otherwise the first convolution has a stride of its own.
        in_channels: Of the images.
    """
    first, then = SIZES[size]
    pad = int(has_padding)
    start = nn.Conv2d(in_channels, first, 4, stride // STRIDE, 3 * pad)
    layers: list[nn.Module] = [
        *(start, nn.ReLU(), nn.AvgPool2d(2, 2, pad)),
        *(nn.Conv2d(first, then, 4, 1, 3 * pad), nn.ReLU(), nn.AvgPool2d(2, 2, pad)),
    ]
    if size == "medium":
        layers += [nn.Conv2d(then, then, 1), nn.ReLU()]
    layers += [nn.Conv2d(then, then, 3, 1, pad), nn.ReLU(), nn.Conv2d(then, num_channels, 4)]
    if size == "medium":
        layers += [nn.ReLU(), nn.Conv2d(num_channels, num_channels, 1)]
    return nn.Sequential(*layers)


class Autoencoder(nn.Module):
    """Reproduces the teacher's features through a bottleneck of 64 numbers (table 8).

    The bottleneck keeps what the whole image shows, so that a wrong arrangement of normal patches
    cannot be reproduced. Images other than 256 x 256 are brought to the paper's 8 x 8 positions
    before the last convolution of the encoder.

    Args:
        num_channels: Of the features.
        stride: Of the teacher's features, in pixels.
        in_channels: Of the images.
    """

    def __init__(self, num_channels: int, stride: int = STRIDE, in_channels: int = 3) -> None:
        super().__init__()
        self.stride = stride
        widths = (in_channels, 32, 32, 64, 64, 64)
        self.encoder = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 4, 2, 1) for inputs, outputs in pairwise(widths)
        )
        self.bottleneck = nn.Conv2d(64, 64, 8)
        self.decoder = nn.ModuleList(nn.Conv2d(64, 64, 4, 1, 2) for _ in RESOLUTIONS)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Sequential(
            nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, num_channels, 3, 1, 1)
        )

    def forward(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Features (N, C, *size) of normalised images (N, C, H, W).

        Args:
            images: Squares.
            size: Height and width of the teacher's features.
        """
        x = images
        for convolution in self.encoder:
            x = convolution(x).relu()
        x = self.bottleneck(resized(x, (8, 8)))
        positions = images.shape[-1] / self.stride
        for convolution, resolution in zip(self.decoder, RESOLUTIONS, strict=True):
            side = max(1, round(resolution * positions / 64))
            x = self.dropout(convolution(resized(x, (side, side))).relu())
        return self.last(resized(x, size))


def resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Features (N, C, H, W) resized bilinearly to `size`, as two matrix products.

    On a GPU, what PyTorch's `interpolate` does in its place where algorithms must be deterministic
    took most of a training step's time.
    """
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    rows, columns = map(partial(_weights, features), features.shape[-2:], size)
    return rows @ features @ columns.T


def _weights(like: Tensor, inputs: int, outputs: int) -> Tensor:
    """The matrix (outputs, inputs) of linear interpolation."""
    unit_vectors = torch.eye(inputs, dtype=like.dtype, device=like.device)
    return F.interpolate(unit_vectors[None], outputs, mode="linear", align_corners=False)[0].T
