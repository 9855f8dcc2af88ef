"""Which images the metrics were measured on, and whether training has seen any of them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from anomaly_detection.data.arrays import IMAGES, OVERVIEWS, TEST, TRAIN, read_index

SIDE = 32  # pixels; images are shrunk to this for the comparison
WINDOW = 9  # pixels of the local mean, which carries the illumination
COMPONENTS = 32  # the main variations of normal images, which do not identify a single one
LIMIT = 0.7
CRITERION = (
    f"correlation of at least {LIMIT}; grey, {SIDE} x {SIDE} pixels, less the local mean of "
    f"{WINDOW} x {WINDOW}, less mean and {COMPONENTS} principal components of the training images"
)
CHUNK = 64  # images in memory at once


def audit_prepared(folder: Path) -> dict[str, Any]:
    """Search a folder that `prepare_category` wrote for leaks between its splits.

    Parts of one kind look alike, so images are compared by what is unique to each: the residual
    after removing the mean and the principal components of all training images.

    Returns:
        `num_images` and `content` (a hash of all files' contents) of each split, and
        `near_duplicates`: pairs of a test and a training image by CRITERION, most similar first.
    """
    index = read_index(folder)
    splits = sorted({row["split"] for row in index})
    hashes = {x: sorted(row["sha256"] for row in index if row["split"] == x) for x in splits}
    is_test = torch.tensor([row["split"] == "test" for row in index])
    name = OVERVIEWS if (folder / TRAIN / OVERVIEWS).exists() else IMAGES
    particular = residuals([folder / part / name for part in (TRAIN, TEST)], ~is_test)
    alike = particular[is_test] @ particular[~is_test].T
    tests, trains = is_test.nonzero()[:, 0].tolist(), (~is_test).nonzero()[:, 0].tolist()
    pairs = [
        {
            "test": index[tests[i]]["path"],
            "train": index[trains[j]]["path"],
            "correlation": round(alike[i, j].item(), 4),
        }
        for i, j in torch.nonzero(alike >= LIMIT).tolist()
    ]
    return {
        "num_images": {split: len(hashes[split]) for split in splits},
        "content": {
            split: hashlib.sha256("".join(hashes[split]).encode()).hexdigest() for split in splits
        },
        "near_duplicate_criterion": CRITERION,
        "near_duplicates": sorted(pairs, key=lambda pair: (-pair["correlation"], pair["test"])),
    }


def residuals(paths: Sequence[Path], is_training: torch.Tensor) -> torch.Tensor:
    """Unit vectors of what training images do not share, of all images in some files: (N, D).

    Two images are near-duplicates if the product of their vectors is at least LIMIT.
    """
    thumbnails = torch.cat([_thumbnails(path) for path in paths])
    thumbnails -= thumbnails[is_training].mean(dim=0)
    training = thumbnails[is_training]
    # In double precision: single precision fails on images that hardly vary.
    _, axes = torch.linalg.eigh((training.T @ training).double())
    axes = axes[:, axes.shape[1] - min(COMPONENTS, len(training) // 4) :].float()
    del training
    thumbnails -= (thumbnails @ axes) @ axes.T
    # The residual of an image with nothing unique is rounding error, not a direction.
    length = thumbnails.norm(dim=1, keepdim=True)
    thumbnails *= torch.where(length > 1e-3 * SIDE, 1 / length, 0.0)
    return thumbnails


def _thumbnails(path: Path) -> torch.Tensor:
    """Small grey images with illumination removed, float32 (N, SIDE * SIDE)."""
    thumbnails = torch.empty(len(np.load(path, mmap_mode="r")), SIDE * SIDE)
    for start in range(0, len(thumbnails), CHUNK):
        # Mapped anew each time, so that pages already read do not stay in memory.
        images = np.load(path, mmap_mode="r")[start : start + CHUNK]
        colours = images[:, :3] * np.float32(255 / np.iinfo(images.dtype).max)
        grey = torch.from_numpy(colours).mean(dim=1)
        small = F.adaptive_avg_pool2d(grey, SIDE)[:, None]
        padded = F.pad(small, [WINDOW // 2] * 4, mode="reflect")
        flat = (small - F.avg_pool2d(padded, WINDOW, stride=1)).flatten(1)
        thumbnails[start : start + CHUNK] = flat
    return thumbnails
