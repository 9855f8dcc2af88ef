"""Devices, precisions, and several processes that train one model."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from anomaly_detection.errors import TrainingError


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; for `auto` the GPU where there is one, else the CPU.

    Of several processes, as started by torchrun, each gets a GPU of its own.

    Raises:
        TrainingError: There is no such device here.
    """
    device = torch.device("cpu" if str(name) == "auto" else name)
    if str(name) == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or device
    if device.type == "cuda" and device.index is None and world_size() > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"training.device must be a device of this machine, got {name} ({reason}); use auto."
        ) from None
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision's name; `auto` is bfloat16 where the hardware has it."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def has_room(device: torch.device, num_bytes: int) -> bool:
    """Whether a GPU can keep as many bytes in a quarter of its free memory."""
    return device.type == "cuda" and 4 * num_bytes <= torch.cuda.mem_get_info(device)[0]


def widen_depthwise_convolutions(model: nn.Module) -> None:
    """Let depthwise convolutions that are trained compute in float32 under autocast.

    For a CPU: in the backward pass, oneDNN's 16-bit kernels for them take several times as long as
    those for float32, more than all other layers gain from 16 bits.
    """
    for module in model.modules():
        is_depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        if is_depthwise and module.weight.requires_grad:
            module.forward = _WideForward(module)


class _WideForward:
    def __init__(self, convolution: nn.Conv2d) -> None:
        self.convolution = convolution

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return type(self.convolution).forward(self.convolution, x.float()).to(x.dtype)


def rank() -> int:
    """This process's number among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device: torch.device) -> None:
    """Meet the other processes: over NCCL on GPUs, over Gloo on CPUs."""
    if world_size() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def gather(values: list[Any]) -> list[Any]:
    """The lists of all processes, one behind another."""
    if world_size() == 1:
        return values
    lists: list[Any] = [None] * world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def synchronise_batch_norm(model: nn.Module) -> None:
    """Let BatchNorm in training mode use the statistics of the batches of all processes.

    `torch.nn.SyncBatchNorm` works on GPUs only, and would replace the modules, and with them the
    activations that timm's BatchNorm layers contain.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = _SynchronisedForward(module)


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
        with torch.no_grad():
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
        scale = norm.weight * (variance + norm.eps).rsqrt()
        out = (centred * scale[:, None, None] + norm.bias[:, None, None]).to(x.dtype)
        return norm.act(norm.drop(out)) if hasattr(norm, "act") else out
