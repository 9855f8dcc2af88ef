"""Devices and precisions."""

import os
import platform
from pathlib import Path

import torch

from anomaly_detection.errors import TrainingError
from anomaly_detection.trainer.numerics import cpu_has_amx, cpu_has_bfloat16
from anomaly_detection.trainer.processes import world_size


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; `auto` is the GPU if there is one, else the CPU.

    Under torchrun, each process gets its own GPU.

    Raises:
        TrainingError: This machine has no such device.
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
            f"hardware.device must be a device of this machine, got {name} ({reason}); use auto."
        ) from None
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype for a precision's name; `auto` is bfloat16 where the hardware supports it."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name as in params.yaml, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def describe_hardware(device: torch.device) -> dict[str, str]:
    """The CPU, the instruction set that PyTorch uses on it, and the GPU if `device` is one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    instructions = [torch.backends.cpu.get_cpu_capability()]
    instructions += ["AVX512-BF16"] * cpu_has_bfloat16() + ["AMX"] * cpu_has_amx()
    hardware = {
        "cpu": named[0] if named else platform.processor() or platform.machine(),
        "instructions": ", ".join(instructions),
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return hardware


def has_room(device: torch.device, num_bytes: int) -> bool:
    """Whether `device` is a GPU with room for that many bytes in a quarter of its free memory."""
    return device.type == "cuda" and 4 * num_bytes <= torch.cuda.mem_get_info(device)[0]
