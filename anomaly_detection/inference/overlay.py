"""A picture with its anomalous pixels in red."""

import numpy as np
from PIL import Image

RED = np.array([255, 0, 0])
FAINTEST, STRONGEST = 0.3, 0.8  # opacity, at the threshold and at the map's highest value


def overlay(pixels: np.ndarray, anomaly_map: np.ndarray, threshold: float) -> Image.Image:
    """Colour the pixels whose value is above the threshold, and no others.

    The score is a mean of the map's highest values, so these pixels are what makes an image
    anomalous.

    Args:
        pixels: uint8 (H, W) or (H, W, 3).
        anomaly_map: float32 of any size, which is resized to H x W bilinearly.
        threshold: Of the score.
    """
    height, width = pixels.shape[:2]
    resized = Image.fromarray(anomaly_map).resize((width, height), Image.Resampling.BILINEAR)
    above = np.asarray(resized) - threshold
    colour = np.array(pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2))
    is_red = above > 0
    if is_red.any():
        shares = above[is_red] / above.max()
        opacity = (FAINTEST + (STRONGEST - FAINTEST) * shares).astype(float)[:, None]
        colour[is_red] = np.rint(colour[is_red] * (1 - opacity) + RED * opacity)
    return Image.fromarray(colour)
