"""A picture with its anomalous pixels in red."""

import numpy as np
from PIL import Image

from anomaly_detection.data.decode import to_planes
from anomaly_detection.data.format import visible

RED = np.array([255, 0, 0])
FAINTEST, STRONGEST = 0.3, 0.8  # opacity, at the threshold and at the map's highest value


def overlay(pixels: np.ndarray, anomaly_map: np.ndarray, threshold: float) -> Image.Image:
    """Colour the pixels whose value is above the threshold, and no others.

    The score is a mean of the map's highest values, so these pixels are what makes an image
    anomalous.

    Args:
        pixels: (H, W) or (H, W, C), of which 8 bits of 3 channels are shown.
        anomaly_map: float32 of any size, which is resized to H x W bilinearly.
        threshold: Of the score.
    """
    height, width = pixels.shape[:2]
    resized = Image.fromarray(anomaly_map).resize((width, height), Image.Resampling.BILINEAR)
    above = np.asarray(resized) - threshold
    colour = np.array(np.moveaxis(visible(to_planes(pixels)), 0, -1))
    is_red = above > 0
    if is_red.any():
        shares = above[is_red] / above.max()
        opacity = (FAINTEST + (STRONGEST - FAINTEST) * shares).astype(float)[:, None]
        colour[is_red] = np.rint(colour[is_red] * (1 - opacity) + RED * opacity)
    return Image.fromarray(colour)
