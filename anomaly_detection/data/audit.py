"""Which images the figures were measured on, and whether training has seen some of them."""

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 32  # pixels to which images are reduced for the comparison
WINDOW = 9  # pixels over which the local mean is taken, which carries the illumination
COMPONENTS = 32  # in which the normal images vary most, and which say nothing of a single one
LIMIT = 0.7
CRITERION = (
    f"correlation of at least {LIMIT}; grey, {SIDE} x {SIDE} pixels, less the local mean of "
    f"{WINDOW} x {WINDOW}, less mean and {COMPONENTS} principal components of the training images"
)
CHUNK = 256


def audit_prepared(folder: Path) -> dict[str, Any]:
    """What `prepare_category` wrote, looked through for leaks.

    Parts of one kind look alike, so images are compared by what is particular to each: what is
    left without the mean and the principal components of all training images.

    Returns:
        `num_images` and `content` (a hash of all files' contents) of each split, and
        `near_duplicates`: pairs of a test and a training image by CRITERION, most alike first.
    """
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        index = list(csv.DictReader(file))
    splits = sorted({row["split"] for row in index})
    hashes = {x: sorted(row["sha256"] for row in index if row["split"] == x) for x in splits}
    thumbnails = _thumbnails(np.load(folder / "images.npy", mmap_mode="r"))
    is_test = np.array([row["split"] == "test" for row in index])
    particular = _particular(thumbnails, thumbnails[~is_test])
    alike = particular[is_test] @ particular[~is_test].T
    tests, trains = np.flatnonzero(is_test), np.flatnonzero(~is_test)
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


def _particular(thumbnails: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """Unit vectors of what the training images have not in common, shape (N, SIDE * SIDE)."""
    mean = training.mean(dim=0)
    # In double precision, since single fails on images that hardly vary.
    _, axes = torch.linalg.eigh(((training - mean).T @ (training - mean)).double())
    axes = axes[:, axes.shape[1] - min(COMPONENTS, len(training) // 4) :].float()
    deviations = thumbnails - mean
    rest = deviations - (deviations @ axes) @ axes.T
    # What is left of an image without anything particular is rounding, and no direction.
    return torch.where(
        rest.norm(dim=1, keepdim=True) > 1e-3 * SIDE, F.normalize(rest, dim=1), torch.zeros(())
    )


def _thumbnails(images: np.ndarray) -> torch.Tensor:
    """Grey, small and without illumination, float32 (N, SIDE * SIDE)."""
    parts = []
    for start in range(0, len(images), CHUNK):
        grey = torch.from_numpy(images[start : start + CHUNK].copy()).float().mean(dim=1)
        small = F.adaptive_avg_pool2d(grey, SIDE)[:, None]
        padded = F.pad(small, [WINDOW // 2] * 4, mode="reflect")
        parts.append((small - F.avg_pool2d(padded, WINDOW, stride=1)).flatten(1))
    return torch.cat(parts)
