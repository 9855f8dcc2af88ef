"""Large images: what tiles find that whole images do not, and what they cost.

    python -m benchmarks.tiles [small] [throughput] [memory]

small       brushed surfaces of 4096 x 4096 pixels, half of the test images with a dull spot of 8
            pixels: the pipeline with tiles and without
throughput  evaluation in tiles against the bare forward passes
memory      100 images of 8192 x 6144, in tiles: time and peak memory of each stage; 10 GB of disk

All of them by default: 30 minutes on two cores.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages import run  # isort: skip, before PyTorch: it makes idle threads sleep

import numpy as np
import torch
from PIL import Image
from ruamel.yaml import YAML
from scipy.ndimage import gaussian_filter

from anomaly_detection.data import PreparedDataset, create_dataloader
from anomaly_detection.evaluation.tiled import predict_images
from anomaly_detection.evaluator import measure
from anomaly_detection.models import load_model
from benchmarks.scale import copy_project, stage

SPOT = 8  # pixels
TILES = {"tile_size": 256, "tile_overlap": 32, "image_size": 256}
REPEATS = 5

Picture = np.ndarray  # uint8 (H, W)


def main(*arguments: str) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *MEASURE], metavar="NAME")
    for name in parser.parse_args(arguments).names or MEASURE:
        with tempfile.TemporaryDirectory() as folder:
            MEASURE[name](Path(folder))
        print()


def small_defects(folder: Path) -> None:
    """Print how well spots are found in tiles and in whole images, with the same surfaces."""
    write_pictures(folder / "parts/plate", brushed, 20, 8)
    copy_project(folder)
    print(f"| {SPOT} pixels in 4096 x 4096 | found | false rejects | image AUROC | pixel AUROC |")
    print("|---|---|---|---|---|")
    for name, options in {"in tiles of 256": TILES, "whole, at 256": {"image_size": 256}}.items():
        change(folder, data={"tile_size": None} | options)
        for step in ("prepare", "train", "evaluate"):
            stage(folder, step, "plate")
        metrics = json.loads((folder / "metrics/plate/evaluate.json").read_text())
        found = metrics["num_anomalous"] - metrics["num_misses"]
        print(
            f"| {name} | {found} of {metrics['num_anomalous']} "
            f"| {metrics['num_false_rejects']} of {metrics['num_normal']} "
            f"| {metrics['image_auroc']:.3f} | {metrics['pixel_auroc']:.3f} |",
            flush=True,
        )


def throughput(folder: Path) -> None:
    """Print the time of an evaluation in tiles, against that of the forward passes alone."""
    write_pictures(folder / "parts/plate", rolled(1024, 1024), 24, 4)
    copy_project(folder)
    change(folder, data=TILES)
    for step in ("prepare", "train"):
        stage(folder, step, "plate")
    model = load_model(folder / "checkpoints/plate/best_model.pth")
    images = PreparedDataset(folder / "data/prepared/plate", "test")

    def evaluated() -> None:
        measure(predict_images(model, images, 32), threshold=3.0)

    @torch.inference_mode()
    def bare() -> None:
        for batch in create_dataloader(images, 32):
            model(batch["image"])

    ratios = [seconds(evaluated) / seconds(bare) for _ in range(REPEATS + 1)][1:]
    milliseconds = 1000 * seconds(bare) / len(images)
    print("| evaluation in tiles, against bare forward passes | ratio | from, to | ms per tile |")
    print("|---|---|---|---|")
    print(
        f"| {len(images)} tiles of 256, overlap 32 | {statistics.median(ratios):.2f} "
        f"| {min(ratios):.2f}, {max(ratios):.2f} | {milliseconds:.1f} |"
    )


def memory(folder: Path) -> None:
    """Print time and peak memory of each stage on very large images."""
    write_pictures(folder / "parts/plate", rolled(6144, 8192), 80, 10)
    copy_project(folder)
    change(folder, data=TILES | {"tile_size": 1024})
    print("| 100 of 8192 x 6144, tiles of 1024 | seconds | peak memory, MB |\n|---|---|---|")
    for name in ("prepare", "train", "evaluate", "plot"):
        cost = stage(folder, name, "plate")
        print(f"| {name} | {cost['wall']:.0f} | {cost['peak_memory'] / 1e6:.0f} |", flush=True)


MEASURE: dict[str, Callable[[Path], None]] = {
    "small": small_defects,
    "throughput": throughput,
    "memory": memory,
}


def seconds(work: Callable[[], None]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def brushed(rng: np.random.Generator) -> Picture:
    """A brushed surface of 4096 x 4096 pixels, and light from one side."""
    lines = gaussian_filter(rng.standard_normal((4096, 4096), np.float32), (0.7, 12))
    clouds = Image.fromarray(rng.standard_normal((40, 40), np.float32))
    smooth = np.asarray(clouds.resize((4096, 4096), Image.Resampling.BICUBIC))
    light = np.linspace(-10, 10, 4096, dtype=np.float32) * rng.choice([-1, 1])
    surface = 130 + 12 * lines / lines.std() + 6 * smooth + light
    return np.rint(surface).clip(0, 255).astype(np.uint8)


def rolled(height: int, width: int) -> Callable[[np.random.Generator], Picture]:
    """Draws surfaces of that size from one, rolled at random: cheap, for where only cost counts."""
    noise = np.random.default_rng(0).standard_normal((height, width), np.float32)
    surface = np.rint(130 + 40 * gaussian_filter(noise, 1.5)).astype(np.uint8)
    return lambda rng: np.roll(surface, rng.integers((height, width)), (0, 1))


def write_pictures(
    folder: Path, draw: Callable[[np.random.Generator], Picture], num_train: int, num_test: int
) -> None:
    """Write normal images to train on, and as many to test without and with a dull spot."""
    rng = np.random.default_rng(0)
    for i in range(num_train):
        save(draw(rng), folder / "train" / "good" / f"{i:03}.jpg")
    for i in range(num_test):
        save(draw(rng), folder / "test" / "good" / f"{i:03}.jpg")
        picture, mask = with_spot(draw(rng), rng)
        save(picture, folder / "test" / "spot" / f"{i:03}.jpg")
        save(255 * mask, folder / "ground_truth" / "spot" / f"{i:03}_mask.png")


def with_spot(picture: Picture, rng: np.random.Generator) -> tuple[Picture, np.ndarray]:
    """A copy with a spot of SPOT pixels that is darker by 60 of 255, and its mask."""
    row, column = rng.integers(SPOT, np.array(picture.shape) - SPOT)
    y, x = np.mgrid[:SPOT, :SPOT] - (SPOT - 1) / 2
    spot = np.hypot(x, y) <= SPOT / 2
    mask = np.zeros_like(picture)
    mask[row : row + SPOT, column : column + SPOT] = spot
    return np.where(mask, picture.astype(int) - 60, picture).clip(0, 255).astype(np.uint8), mask


def save(picture: np.ndarray, path: Path) -> None:
    """Write a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"quality": 95} if path.suffix == ".jpg" else {"compress_level": 1}
    Image.fromarray(picture).save(path, **options)


def change(folder: Path, **sections: dict[str, Any]) -> None:
    """Change parameters of the copy: those given, and a model that is fitted fast."""
    sections["model"] = {"name": "patchcore"}
    sections["patchcore"] = {"max_patches": 16384, "bank_size": 1024}
    sections["data"] |= {"root": "parts", "categories": ["plate"], "calibration_fraction": 0.25}
    sections["evaluation"] = {"false_reject_rate": 0.2}  # what 5 calibration images can promise
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    for name, values in sections.items():
        params[name] |= values
    yaml.dump(params, folder / "params.yaml")


if __name__ == "__main__":
    run(main)
