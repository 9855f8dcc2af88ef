"""Defects of known kind, size and place on normal images.

They show what a detector can do when no real defects are available. They do not replace real
ones, and their metrics are never mixed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_image

from anomaly_detection.data.sample import UNKNOWN

PLACES = 8  # tried, where not any place will do
SIZES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3)  # shares of the image's side


class Case(NamedTuple):
    """An image, and the kind, size and opacity of the defect to add, as in `add_defect`.

    If it is a tile of a larger image, `position` is its number, and `others` the highest score of
    that image's other tiles.
    """

    image: np.ndarray
    kind: str
    size: float
    opacity: float = 1.0
    channels: int = 3
    others: float = -np.inf
    position: int = 0


def every_defect(images: np.ndarray, channels: int = 3) -> list[Case]:
    """Every image with every kind and size of defect."""
    return [
        Case(image, kind, size, channels=channels)
        for kind in KINDS
        for size in SIZES
        for image in images
    ]


def one_defect_each(images: np.ndarray, channels: int = 3) -> list[Case]:
    """Each image once, cycling through kinds and sizes."""
    kinds, num_sizes = list(KINDS), len(SIZES)
    # Each round through the sizes starts at another kind: a few images cover all sizes, and 32
    # all pairs.
    chosen = [
        (kinds[(i + i // num_sizes) % len(kinds)], SIZES[i % num_sizes]) for i in range(len(images))
    ]
    return [
        Case(image, *defect, channels=channels)
        for image, defect in zip(images, chosen, strict=True)
    ]


def synthetic_batches(
    cases: Sequence[Case], seed: int, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """The cases' images with their defects, placed at random with `seed`.

    Yields:
        Batches with `image`, `label` (1), `mask` (N, 1, H, W), `defect_type` (the kind), `size`,
        `others` and `position`.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, len(cases), batch_size):
        part = cases[start : start + batch_size]
        made = [add_defect(x.image, x.kind, x.size, rng, x.opacity, x.channels) for x in part]
        yield {
            "image": torch.from_numpy(np.stack([image for image, _ in made])),
            "label": torch.ones(len(part), dtype=torch.long),
            "mask": torch.from_numpy(np.stack([mask for _, mask in made]))[:, None],
            "defect_type": [case.kind for case in part],
            "size": [case.size for case in part],
            "others": [case.others for case in part],
            "position": torch.tensor([case.position for case in part]),
        }


def add_defect(
    image: np.ndarray,
    kind: str,
    size: float,
    rng: np.random.Generator,
    opacity: float = 1.0,
    channels: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """A copy of an image with one defect, and its mask.

    A uint16 image gets the same defect as a uint8 one, relative to full scale.

    Args:
        image: uint8 or uint16 of shape (C, H, W); with a channel after these, the defect is only
            where that is not 0, at least in part.
        kind: One of FAMILIES.
        size: Largest extent as a share of the image's shorter side, in (0, 1).
        rng: Source of place, shape and strength.
        opacity: How much of the image it covers where it is strongest, in (0, 1].
        channels: C, 3 or 4.

    Returns:
        The image, and a uint8 mask of shape (H, W) that is 1 on the defect.
    """
    if kind not in FAMILIES:
        raise ValueError(f"kind must be one of {', '.join(FAMILIES)}, got {kind!r}.")
    if len(image) > channels:
        return _inside(image, kind, size, rng, opacity, channels)
    extent = max(1.0, size * min(image.shape[1:]))
    shape, change = FAMILIES[kind]
    # Where there is no part, none can be missing, so take the best of several places. What would
    # be seen there instead does not depend on the place.
    num_places = PLACES if kind in FROM_THE_IMAGE else 1
    alphas = [shape(image.shape[1:], extent, rng) for _ in range(num_places)]
    full_scale = np.iinfo(image.dtype).max
    unit = np.float32(full_scale // 255)  # of the changes below, which are those of 8 bits
    values = image.astype(np.float32) / unit
    changed = change(values, alphas[0], extent, rng)
    blends = ((unit * (values + opacity * a * (changed - values)), a) for a in alphas)
    results = [(np.rint(x).clip(0, full_scale).astype(image.dtype), a) for x, a in blends]
    blended, alpha = max(results, key=lambda result: np.abs(result[0] - image.astype(float)).sum())
    return blended, (alpha >= 0.5 * alpha.max()).astype(np.uint8)


def _inside(
    image: np.ndarray,
    kind: str,
    size: float,
    rng: np.random.Generator,
    opacity: float,
    channels: int,
) -> tuple[np.ndarray, np.ndarray]:
    """As `add_defect`; of several places, the one with most of the defect where it is judged."""
    seen, last = image[:channels], image[channels:]
    region = last > 0
    made = [add_defect(seen, kind, size, rng, opacity, channels) for _ in range(PLACES)]
    changed, mask = max(made, key=lambda result: (result[1] * region[0]).sum() / result[1].sum())
    pixels = np.where(region, changed, seen)
    return np.concatenate([pixels, last]), np.where(region[0], mask, UNKNOWN).astype(np.uint8)


def _spot(size: tuple[int, int], extent: float, rng: np.random.Generator) -> np.ndarray:
    """An ellipse with a soft edge, float32 (H, W) in [0, 1]."""
    radius = extent / 2
    height, width = size
    row = rng.uniform(min(radius, height / 2), max(height - radius, height / 2))
    column = rng.uniform(min(radius, width / 2), max(width - radius, width / 2))
    angle, flatness = rng.uniform(0, np.pi), rng.uniform(0.6, 1.0)
    y, x = np.mgrid[:height, :width] + 0.5
    y, x = y - row, x - column
    along = x * np.cos(angle) + y * np.sin(angle)
    across = (y * np.cos(angle) - x * np.sin(angle)) / flatness
    distance = np.hypot(along, across)
    edge = max(0.5, 0.2 * radius)
    alpha = np.clip((radius - distance) / edge + 0.5, 0, 1).astype(np.float32)
    alpha[int(row), int(column)] = 1.0
    return alpha


def _line(size: tuple[int, int], extent: float, rng: np.random.Generator) -> np.ndarray:
    """A thin, slightly bent line, float32 (H, W) in [0, 1]."""
    height, width = size
    angle = rng.uniform(0, np.pi)
    half = 0.5 * extent * np.array([np.sin(angle), np.cos(angle)])
    room = np.abs(half)
    centre = rng.uniform(room, np.maximum(np.array([height - 1, width - 1]) - room, room))
    bend = rng.normal(0, 0.08 * extent, 2)
    points = [tuple((centre + part)[::-1]) for part in (-half, bend, half)]
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).line(points, fill=255, width=max(1, round(extent / 15)))
    alpha = np.asarray(canvas, dtype=np.float32) / 255
    if not alpha.any():
        alpha = _spot(size, 1.0, rng)
    return alpha


def _shift(
    image: np.ndarray, alpha: np.ndarray, extent: float, rng: np.random.Generator
) -> np.ndarray:
    """Brighter or darker by a quarter to half of the range, whichever the place has room for."""
    amount = rng.uniform(64, 128)
    return image + (amount if np.average(image.mean(axis=0), weights=alpha) < 128 else -amount)


def _texture(
    image: np.ndarray, alpha: np.ndarray, extent: float, rng: np.random.Generator
) -> np.ndarray:
    """Part of a photograph, blended in at 80 %; grey on grey images, and in a fourth channel."""
    photograph = _photograph()
    grey = photograph.mean(axis=0, keepdims=True)
    if (image == image[0]).all():
        photograph = grey.repeat(len(image), axis=0)
    elif len(image) > len(photograph):
        photograph = np.concatenate([photograph, grey])
    height, width = image.shape[1:]
    row = rng.integers(0, photograph.shape[1] - 1)
    column = rng.integers(0, photograph.shape[2] - 1)
    rows = np.arange(row, row + height) % photograph.shape[1]
    columns = np.arange(column, column + width) % photograph.shape[2]
    return 0.2 * image + 0.8 * photograph[:, rows[:, None], columns]


def _surroundings(
    image: np.ndarray, alpha: np.ndarray, extent: float, rng: np.random.Generator
) -> np.ndarray:
    """The image without details of the defect's size."""
    return gaussian_filter(image, (0, extent, extent))


def _elsewhere(
    image: np.ndarray, alpha: np.ndarray, extent: float, rng: np.random.Generator
) -> np.ndarray:
    """The image shifted, perhaps mirrored, and a little brighter or darker.

    After CutPaste (Li et al., CVPR 2021, arXiv:2104.04015).
    """
    height, width = image.shape[1:]
    mirrored = image[:, :: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    shifted = np.roll(mirrored, (rng.integers(height), rng.integers(width)), axis=(1, 2))
    return shifted + rng.uniform(16, 32) * rng.choice([-1, 1])


def _contrast(
    image: np.ndarray, alpha: np.ndarray, extent: float, rng: np.random.Generator
) -> np.ndarray:
    """The image with details of up to the defect's size two to four times as strong, or weak."""
    mean = _surroundings(image, alpha, extent, rng)
    factor = rng.uniform(2, 4)
    return mean + (image - mean) * factor ** rng.choice([-1, 1])


def _noise(
    image: np.ndarray, alpha: np.ndarray, extent: float, rng: np.random.Generator
) -> np.ndarray:
    """The image without its details, with grey noise of a random grain instead."""
    grain = rng.uniform(0.3, max(0.5, extent / 8))
    noise = gaussian_filter(rng.normal(size=image.shape[1:]).astype(np.float32), grain)
    return _surroundings(image, alpha, extent, rng) + rng.uniform(16, 48) * noise / noise.std()


@cache
def _photograph() -> np.ndarray:
    return np.moveaxis(load_sample_image("china.jpg"), -1, 0).astype(np.float32)


Shape = Callable[[tuple[int, int], float, np.random.Generator], np.ndarray]
Change = Callable[[np.ndarray, np.ndarray, float, np.random.Generator], np.ndarray]
KINDS: dict[str, tuple[Shape, Change]] = {
    "blob": (_spot, _shift),
    "missing": (_spot, _surroundings),
    "scratch": (_line, _shift),
    "texture": (_spot, _texture),
}

# Those that choose between models need more families than those that are reported.
FAMILIES: dict[str, tuple[Shape, Change]] = KINDS | {
    "contrast": (_spot, _contrast),
    "cut-paste": (_spot, _elsewhere),
    "noise": (_spot, _noise),
}
FROM_THE_IMAGE = ("missing", "contrast", "cut-paste")  # these change nothing on a plain background
