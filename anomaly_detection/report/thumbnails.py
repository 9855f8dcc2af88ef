"""Images, anomaly maps and masks as small pictures, for a page that contains them all."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from anomaly_detection.data.format import visible

SIDES = (512, 384, 256, 192, 128, 96, 64)  # pixels; one of them is chosen for all thumbnails
BYTES_PER_IMAGE = 6500  # a thumbnail with its map, on average: 500 make 4.3 MB as base64
SAMPLE = 16  # thumbnails tried to choose the side


def thumbnails(
    pictures: np.ndarray,
    maps: np.ndarray | None,
    masks: Sequence[np.ndarray | None],
    *,
    map_low: float = 0.0,
    map_limit: float = 1.0,
) -> list[dict[str, str | None]]:
    """Each image, its anomaly map and its mask as small pictures, as large as fits their bytes.

    Args:
        pictures: As in images.npy of `data.arrays`.
        maps: (N, S, S), or None for a model that gives none.
        masks: N arrays uint8 (S, S), or None.
        map_low: The map value that becomes 0; lower ones do too.
        map_limit: The map value that becomes 255; between the two the scale is a square root.

    Returns:
        For each image `picture`, `map` and `mask` as data URLs; the latter two may be None.
    """

    def encode(i: int, side: int) -> tuple[bytes, bytes, bytes]:
        anomaly_map, mask = None if maps is None else maps[i], masks[i]
        half = max(side // 2, 32)  # maps are smooth: nothing is lost to the eye
        return (
            _webp(np.moveaxis(visible(pictures[i]), 0, -1), side, lossless=False),
            b"" if anomaly_map is None else _webp(_levels(anomaly_map, map_low, map_limit), half),
            b"" if mask is None else _webp((mask == 1).astype(np.uint8) * 255, side),
        )

    sample = np.linspace(0, len(pictures) - 1, min(SAMPLE, len(pictures))).astype(int).tolist()
    full = pictures.shape[-1]
    for side in sorted({min(side, full) for side in SIDES}, reverse=True):
        size = sum(len(part) for i in sample for part in encode(i, side))
        if size <= BYTES_PER_IMAGE * len(sample):
            break
    return [
        {
            key: f"data:image/webp;base64,{base64.b64encode(part).decode()}" if part else None
            for key, part in zip(("picture", "map", "mask"), encode(i, side), strict=True)
        }
        for i in range(len(pictures))
    ]


def _levels(anomaly_map: np.ndarray, low: float, limit: float) -> np.ndarray:
    levels = 255 * np.sqrt(np.clip((anomaly_map - low) / (limit - low), 0, 1))
    return np.rint(levels).astype(np.uint8)


def _webp(values: np.ndarray, side: int, lossless: bool = True) -> bytes:
    method = Image.Resampling.BICUBIC if lossless else Image.Resampling.LANCZOS
    image, file = Image.fromarray(values).resize((side, side), method), io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=85, method=4)
    return file.getvalue()
