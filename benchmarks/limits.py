"""Where a training step and inference spend their time, against the hardware's limit.

    python -m benchmarks.limits [--backbone NAME] [--weights NAME] [--precision NAME]

That limit is the speed of a large matrix product in the same precision.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable

from stages import run  # isort: skip, before PyTorch: it makes idle threads sleep

import torch
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from anomaly_detection.models import restore, snapshot
from anomaly_detection.models.stfpm import STFPMModel, STFPMTrainer
from benchmarks.run import SETTINGS, machine

REPEATS, OPERATORS = 5, 6


def main(*arguments: str) -> None:
    """Measure, and print Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--backbone", default=SETTINGS["backbone"])
    parser.add_argument("--weights", default=SETTINGS["weights"])
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args(arguments)
    model = STFPMModel(options.backbone, weights=options.weights)
    trainer = STFPMTrainer(model, checkpoint_dir=None, precision=options.precision)
    size, side = SETTINGS["batch_size"], SETTINGS["image_size"]
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, device=trainer.device)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"backbone {options.backbone}, weights {options.weights}, {size} images of {side}\n")
    print("| work | GFLOP/image | ms/image | GFLOP/s | of a matrix product's | operators |")
    print("|---|---|---|---|---|---|")
    limit = matrix_product(trainer)
    forward = floating_point_operations(
        trainer.model.teacher_model, trainer.model.normalised(images)
    )
    for name, (passes, work) in pieces(trainer, images).items():
        flops, seconds = passes * forward, median_seconds(work, trainer.device)
        dearest = operators(work, trainer.device)
        shares = ", ".join(f"{key} {share:.0%}" for key, share in dearest.items())
        print(
            f"| {name} | {flops / size / 1e9:.1f} | {1000 * seconds / size:.1f} | "
            f"{flops / seconds / 1e9:.0f} | {flops / seconds / limit:.0%} | {shares} |"
        )


def pieces(
    trainer: STFPMTrainer, images: torch.Tensor
) -> dict[str, tuple[int, Callable[[], object]]]:
    """The operations on a batch, by name, each with its cost in forward passes of one network.

    A backward pass costs two forward passes: gradients of the inputs and of the weights.
    """
    model, mixed = trainer.model, trainer.dtype != torch.float32
    optimizer = torch.optim.AdamW(model.student_model.parameters())
    model.standardise([{"image": images}], trainer.device)  # any scale will do
    precision = torch.autocast(trainer.device.type, trainer.dtype, enabled=mixed)
    detector = restore(snapshot("stfpm", model), trainer.device, trainer.dtype)

    def step(known: dict[str, torch.Tensor] | None) -> None:
        with precision:
            loss = trainer.loss_fn(*model.train().extract(images, known))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad(), precision:
        known = model.teacher_model(model.normalised(images))
    return {
        "step, first epoch": (4, lambda: step(None)),
        "step, features known": (3, lambda: step(known)),
        "inference": (2, torch.inference_mode()(lambda: detector(images))),
    }


def matrix_product(trainer: STFPMTrainer, side: int = 4096) -> float:
    """Floating-point operations per second of a product of `side` x `side` matrices."""
    a, b = torch.rand(2, side, side, device=trainer.device, dtype=trainer.dtype)
    return 2 * side**3 / median_seconds(lambda: a @ b, trainer.device)


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds per call, after a warm-up call."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def floating_point_operations(net: nn.Module, images: torch.Tensor) -> int:
    """Floating-point operations of a forward pass: two per multiply-add."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(images)
    return counter.get_total_flops()


def operators(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The shares of device time of PyTorch's most expensive operators."""
    with profile() as profiler:
        work()
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[event.key.removeprefix("aten::")] += getattr(event, spent)
    return {name: spent / times.total() for name, spent in times.most_common(OPERATORS)}


if __name__ == "__main__":
    run(main)
