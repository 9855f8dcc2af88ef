"""Which images the metrics were measured on, and whether training has seen any of them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    f"{WINDOW} x {WINDOW}, less mean and {COMPONENTS} principal components of those compared with"
)
CHUNK = 64  # images in memory at once
ROWS = 1024  # images that are compared with all others at once
ORDER = ("test", "calibration", "validation", "fit")  # each judges what comes from those after it
LISTED = 500  # pairs


def audit_prepared(folder: Path) -> dict[str, Any]:
    """Search a folder that `prepare_category` wrote for leaks between its splits.

    Parts of one kind look alike, so images are compared by what is unique to each: the residual
    after removing the mean and the principal components of the images that they are compared with.

    Returns:
        `num_images` and `content` (a hash of all files' contents) of each split; by CRITERION
        `near_duplicates`, the LISTED most similar pairs of images in two splits, and for each
        split `num_near_duplicates`, how many `pairs` it has with those after it in ORDER, and how
        many of its `images` are in one; and `parts_in_train_and_test`, those of which the data set
        has pictures in both.
    """
    index = read_index(folder)
    splits = sorted({row["split"] for row in index})
    hashes = {x: sorted(row["sha256"] for row in index if row["split"] == x) for x in splits}
    name = OVERVIEWS if (folder / TRAIN / OVERVIEWS).exists() else IMAGES
    images = small_images([folder / part / name for part in (TRAIN, TEST)])
    pairs = _near_duplicates(images, torch.tensor([ORDER.index(row["split"]) for row in index]))
    parts = [{x["part"] for x in index if (x["split"] == "test") == test} for test in (True, False)]
    return {
        "num_images": {split: len(hashes[split]) for split in splits},
        "content": {
            split: hashlib.sha256("".join(hashes[split]).encode()).hexdigest() for split in splits
        },
        "near_duplicate_criterion": CRITERION,
        "num_near_duplicates": {split: _count(pairs, index, split) for split in ORDER[:-1]},
        "near_duplicates": [
            {
                "splits": [index[i]["split"] for i in pair.images],
                "paths": [index[i]["path"] for i in pair.images],
                "correlation": round(pair.correlation, 4),
            }
            for pair in sorted(pairs, key=lambda x: (-x.correlation, x.images))[:LISTED]
        ],
        "parts_in_train_and_test": sorted(parts[0] & parts[1]),
    }


class Pair(NamedTuple):
    """Two near-duplicates: the numbers of their rows, in ORDER of their splits."""

    images: tuple[int, int]
    correlation: float


def _near_duplicates(images: torch.Tensor, ranks: torch.Tensor) -> list[Pair]:
    """The pairs of images in two splits, from `small_images` and their splits' ranks (N,)."""
    pairs = []
    for rank in range(len(ORDER) - 1):
        numbers = (ranks >= rank).nonzero()[:, 0]
        is_after = ranks[numbers] > rank
        particular = residuals(images[numbers], is_after)
        own, after = numbers[~is_after], numbers[is_after]
        others = particular[is_after].T
        for start in range(0, len(own), ROWS):
            alike = particular[~is_after][start : start + ROWS] @ others
            for i, j in torch.nonzero(alike >= LIMIT).tolist():
                pair = int(own[start + i]), int(after[j])
                pairs.append(Pair(pair, alike[i, j].item()))
    return pairs


def _count(pairs: list[Pair], index: list[dict[str, str]], split: str) -> dict[str, int]:
    own = [pair.images[0] for pair in pairs if index[pair.images[0]]["split"] == split]
    return {"pairs": len(own), "images": len(set(own))}


def residuals(thumbnails: torch.Tensor, is_known: torch.Tensor) -> torch.Tensor:
    """Unit vectors of what known images do not share, in place of `small_images`: (N, D).

    Two images are near-duplicates if the product of their vectors is at least LIMIT.
    """
    thumbnails -= thumbnails[is_known].mean(dim=0)
    known = thumbnails[is_known]
    # In double precision: single precision fails on images that hardly vary.
    _, axes = torch.linalg.eigh((known.T @ known).double())
    axes = axes[:, axes.shape[1] - min(COMPONENTS, len(known) // 4) :].float()
    del known
    thumbnails -= (thumbnails @ axes) @ axes.T
    # The residual of an image with nothing unique is rounding error, not a direction.
    length = thumbnails.norm(dim=1, keepdim=True)
    thumbnails *= torch.where(length > 1e-3 * SIDE, 1 / length, 0.0)
    return thumbnails


def small_images(paths: Sequence[Path]) -> torch.Tensor:
    """Small grey images with illumination removed, float32 (N, SIDE * SIDE), of several files."""
    return torch.cat([_thumbnails(path) for path in paths])


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
