"""Processes that train one model together, as torchrun starts them."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """This process's rank under torchrun; 0 without it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device: torch.device) -> None:
    """Connect to the other processes: over NCCL on GPUs, over Gloo on CPUs."""
    if world_size() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def gather(values: list[Any]) -> list[Any]:
    """The lists of all processes, concatenated in rank order."""
    if world_size() == 1:
        return values
    lists: list[Any] = [None] * world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def wait_for_all() -> None:
    """Block until all processes get here."""
    if world_size() > 1:
        dist.barrier()


def distributed_step(model: nn.Module, step: Callable[..., Any]) -> DistributedDataParallel:
    """A training step after whose backward pass all processes have the same gradients."""
    return DistributedDataParallel(_Step(model, step))


class _Step(nn.Module):
    """The step as the forward pass that DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, batch: Any, batch_idx: int) -> Any:
        return self.step(batch, batch_idx)


def without_synchronisation(step: Any) -> contextlib.AbstractContextManager:
    """While batches accumulate, gradients need not travel between processes."""
    if isinstance(step, DistributedDataParallel):
        return step.no_sync()
    return contextlib.nullcontext()
