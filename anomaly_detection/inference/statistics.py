"""How bright, rich in contrast and sharp pictures are: what tells the camera from the parts."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from anomaly_detection.data.arrays import PreparedArrays
from anomaly_detection.data.frame import Frame

MOST_IMAGES = 1000  # whose statistics a detector has


class Statistics(NamedTuple):
    """Of what a detector judges in a picture; of a tiled one, the mean over its tiles.

    Attributes:
        brightness: Mean of the grey values, in [0, 1].
        contrast: Their standard deviation, in [0, 0.5].
        sharpness: Root mean square of the differences between neighbouring pixels, as a share of
            the contrast, in [0, 2], so that another exposure alone leaves it as it is.
    """

    brightness: float
    contrast: float
    sharpness: float


def statistics_of(tiles: Iterable[np.ndarray], frame: Frame) -> Statistics:
    """The statistics of a picture's tiles (C, S, S), as the frame has cut them."""
    brightness, contrast, sharpness = np.mean([_of_tile(x, frame) for x in tiles], axis=0).round(6)
    return Statistics(float(brightness), float(contrast), float(sharpness))


def statistics_of_images(arrays: PreparedArrays) -> dict[str, list[float]]:
    """Each statistic of prepared images, of `MOST_IMAGES` evenly spaced ones at most."""
    num_images = len(arrays.rows)
    chosen = np.linspace(0, num_images - 1, min(num_images, MOST_IMAGES)).astype(int)
    tiles = (arrays.tiles_of(i) for i in chosen)
    read = (arrays.read(range(part.start, part.stop)) for part in tiles)
    columns = zip(*(statistics_of(part, arrays.frame) for part in read), strict=True)
    return {name: list(x) for name, x in zip(Statistics._fields, columns, strict=True)}


def _of_tile(tile: np.ndarray, frame: Frame) -> tuple[float, float, float]:
    channels = frame.format.channels
    grey = tile[:channels].mean(axis=0, dtype=np.float32) / frame.format.full_scale
    values, down, right = grey, np.diff(grey, axis=0), np.diff(grey, axis=1)
    if len(tile) > channels:
        judged = tile[-1] > 0
        values = grey[judged]
        down = down[judged[1:] & judged[:-1]]
        right = right[judged[:, 1:] & judged[:, :-1]]
    contrast = float(values.std())
    squares = sum(float(np.square(steps).sum()) for steps in (down, right))
    num_steps = down.size + right.size
    step = (squares / num_steps) ** 0.5 if num_steps else 0.0
    return float(values.mean()), contrast, step / contrast if contrast else 0.0
