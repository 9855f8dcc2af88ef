"""Images, anomaly maps and masks as small pictures, for a page that carries them all."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDES = (512, 384, 256, 192, 128, 96, 64)  # pixels of a thumbnail, of which one is chosen
BYTES_PER_IMAGE = 6500  # of a thumbnail and its map, on average: 500 make 4.3 MB as base64
SAMPLE = 16  # thumbnails that are tried to choose the side


def thumbnails(
    pictures: np.ndarray, maps: np.ndarray, masks: Sequence[np.ndarray | None], map_limit: float
) -> list[dict[str, str | None]]:
    """Each image, its anomaly map and its mask as small pictures, as large as their bytes allow.

    Args:
        pictures: uint8 (N, 3, S, S).
        maps: (N, S, S), not negative.
        masks: N arrays uint8 (S, S), or None.
        map_limit: The map value that becomes 255; the scale is its square root.

    Returns:
        For each image `picture`, `map` and `mask` as data URLs; `mask` may be None.
    """
    sample = np.linspace(0, len(pictures) - 1, min(SAMPLE, len(pictures))).astype(int)
    full = pictures.shape[-1]
    for side in sorted({min(side, full) for side in SIDES}, reverse=True):
        tried = [_encode(pictures[i], maps[i], masks[i], map_limit, side) for i in sample]
        if sum(len(part) for parts in tried for part in parts) <= BYTES_PER_IMAGE * len(sample):
            break
    return [
        {
            key: f"data:image/webp;base64,{base64.b64encode(part).decode()}" if part else None
            for key, part in zip(("picture", "map", "mask"), parts, strict=True)
        }
        for picture, anomaly_map, mask in zip(pictures, maps, masks, strict=True)
        for parts in [_encode(picture, anomaly_map, mask, map_limit, side)]
    ]


def _encode(
    picture: np.ndarray,
    anomaly_map: np.ndarray,
    mask: np.ndarray | None,
    map_limit: float,
    side: int,
) -> tuple[bytes, bytes, bytes]:
    levels = 255 * np.sqrt(np.clip(anomaly_map / map_limit, 0, 1))
    image = Image.fromarray(np.moveaxis(picture, 0, -1))
    half = max(side // 2, 32)  # maps are smooth: the finest level has a quarter of the image's side
    return (
        _webp(image.resize((side, side), Image.Resampling.LANCZOS), lossless=False),
        _webp(Image.fromarray(np.rint(levels).astype(np.uint8)).resize((half, half)), True),
        b""
        if mask is None
        else _webp(Image.fromarray((mask == 1).astype(np.uint8) * 255).resize((side, side)), True),
    )


def _webp(image: Image.Image, lossless: bool) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=85, method=4)
    return file.getvalue()
