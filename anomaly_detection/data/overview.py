"""Large pictures, and maps of them, as small squares: for the report, and to compare pictures by.

What is not square is centred, between black bars.
"""

import numpy as np
from PIL import Image

from anomaly_detection.data.decode import to_planes
from anomaly_detection.data.format import visible

SIDE = 512  # pixels


def overview(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) as uint8 (3, SIDE, SIDE)."""
    height, width = _fitted(pixels)
    colours = np.moveaxis(visible(to_planes(pixels)), 0, -1)
    small = Image.fromarray(colours).resize((width, height), Image.Resampling.BOX)
    return _centred(np.moveaxis(np.asarray(small), -1, 0))


def overview_of_map(values: np.ndarray) -> np.ndarray:
    """Values (H, W) of any dtype as (SIDE, SIDE), each the highest of those that it stands for.

    So a small defect's are not lost.
    """
    for axis, length in enumerate(_fitted(values)):
        starts = np.arange(length) * values.shape[axis] // length
        values = np.maximum.reduceat(values, starts, axis=axis)
    return _centred(values)


def _fitted(pixels: np.ndarray) -> tuple[int, int]:
    """Height and width in a square of SIDE."""
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _centred(pixels: np.ndarray) -> np.ndarray:
    missing = [SIDE - length for length in pixels.shape[-2:]]
    around = [(0, 0)] * (pixels.ndim - 2) + [(x // 2, x - x // 2) for x in missing]
    return np.pad(pixels, around)
