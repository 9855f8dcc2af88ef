"""Workarounds where PyTorch is too slow, wrong or incomplete, with reasons and when to remove them.

Nothing else in the library touches PyTorch's internals or replaces a module's forward pass.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16; others are slower with it than with float32.

    Remove once torch.cpu has a public equivalent of torch.cuda.is_bf16_supported.
    """
    return torch.cpu._is_avx512_bf16_supported()


def cpu_has_amx() -> bool:
    """Whether this CPU has AMX. Remove once torch.cpu has a public function for it."""
    return torch.cpu._is_amx_tile_supported()


def widen_depthwise_convolutions(model: nn.Module) -> None:
    """Make trainable depthwise convolutions compute in float32 under autocast.

    For CPUs: in the backward pass, oneDNN's 16-bit depthwise kernels take several times as long as
    its float32 ones, more than all other layers gain from 16 bits. Remove once they are faster.
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or not module.weight.requires_grad:
            continue
        if module.groups == module.in_channels > 1:
            _replace_forward(module, _WideForward(module))


def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    module.forward = forward


class _WideForward:
    def __init__(self, convolution: nn.Conv2d) -> None:
        self.convolution = convolution

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return type(self.convolution).forward(self.convolution, x.float()).to(x.dtype)


def count_batch_norm_once(net: nn.Module) -> None:
    """Keep gradient checkpointing from changing BatchNorm's running statistics.

    The backward pass runs the forward pass again, which would count each batch twice. Remove once
    torch.utils.checkpoint does not update buffers in the second pass.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(partial(_count_once, momentum=module.momentum))


def _count_once(norm: nn.BatchNorm2d, _: tuple[Tensor], momentum: float | None) -> None:
    """Freeze the running statistics while the backward pass runs the forward pass again."""
    is_recomputed = torch._C._current_graph_task_id() != -1
    norm.momentum = 0.0 if is_recomputed else momentum
    if is_recomputed and norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked -= 1


def synchronise_batch_norm(model: nn.Module) -> None:
    """Make BatchNorm in training mode use batch statistics over all processes.

    `torch.nn.SyncBatchNorm` works on GPUs only, and replaces the modules together with the
    activations in timm's BatchNorm layers. Remove once it works over Gloo and in place.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            _replace_forward(module, _SynchronisedForward(module))


class _SynchronisedForward:
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not norm.training:
            return type(norm).forward(norm, x)
        count = all_reduce(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        wide = x.float()
        mean = all_reduce(wide.sum(dim=(0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = all_reduce(centred.square().sum(dim=(0, 2, 3))) / count
        self._track(mean.detach(), (variance * count / (count - 1)).detach())
        scale = (variance + norm.eps).rsqrt()
        if norm.affine:
            scale = norm.weight * scale
        out = centred * scale[:, None, None]
        if norm.affine:
            out = out + norm.bias[:, None, None]
        out = out.to(x.dtype)
        for module in norm.children():  # timm's dropout and activation
            out = module(out)
        return out

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        norm = self.norm
        if (
            norm.num_batches_tracked is None
            or norm.running_mean is None
            or norm.running_var is None
        ):
            return
        norm.num_batches_tracked += 1
        momentum = norm.momentum
        if momentum is None:  # cumulative mean over batches
            momentum = 1 / norm.num_batches_tracked.item()
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance, momentum)
