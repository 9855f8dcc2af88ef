"""Fold BatchNorm into convolutions: the same features, faster."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


@torch.no_grad()
def folded(net: nn.Module, images: Tensor) -> nn.Module:
    """A network in eval mode with each BatchNorm folded into the convolution before it.

    Returns the network itself if the outputs for `images` would differ by more than rounding.
    """
    copy = deepcopy(net)
    for convolution, norm in _normalised_convolutions(copy, images):
        _fold(copy, convolution, norm)
    levels = zip(net(images), copy(images), strict=True)
    same = all((one - other).abs().max() <= 1e-4 * one.abs().max() for one, other in levels)
    return copy if same else net


def _normalised_convolutions(
    net: nn.Module, images: Tensor
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each BatchNorm whose input is a convolution's output, with that convolution."""
    made, pairs = {}, []  # by output id; keeping the outputs keeps ids unique

    def note_output(convolution: nn.Conv2d, _: tuple[Tensor], output: Tensor) -> None:
        made[id(output)] = convolution, output

    def note_pair(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        if id(inputs[0]) in made:
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
    """Fold the BatchNorm into the convolution, and keep what timm's does after normalising."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )
    name = next(name for name, module in net.named_modules() if module is norm)
    net.set_submodule(name, nn.Sequential(*norm.children()))  # timm's dropout and activation
