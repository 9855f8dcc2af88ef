"""Pictures as they come in, and for people to look at."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError
from starlette.exceptions import HTTPException

from anomaly_detection.data.decode import FORMATS, to_planes
from anomaly_detection.data.format import visible
from anomaly_detection.data.tiff import read_header
from anomaly_detection.errors import one_line
from anomaly_detection.inference.detector import Detector, Prediction
from anomaly_detection.inference.overlay import overlay

LONGEST = 1024  # pixels on the longer side of what people look at
SUFFIXES = {b"\x89P": ".png", b"\xff\xd8": ".jpg", b"BM": ".bmp"}


def check_header(content: bytes, max_pixels: int) -> None:
    """Refuse what should not be decoded, before a pixel is.

    Raises:
        HTTPException: It is empty, of no format that is read, or has too many pixels.
    """
    if not content:
        raise HTTPException(400, "a picture must be sent, got no bytes.")
    try:
        num_pixels = _num_pixels(content)
    except UnidentifiedImageError:
        raise HTTPException(
            415, f"image: must be a whole one of {', '.join(FORMATS)}, got other bytes."
        ) from None
    except Image.DecompressionBombError:
        num_pixels = None
    except Exception as error:  # a damaged file can raise anything
        raise HTTPException(
            422, f"image: must be whole, but its header cannot be read ({one_line(error)})."
        ) from None
    if num_pixels is None or num_pixels > max_pixels:
        raise HTTPException(
            413,
            f"image: must have at most {max_pixels:,} pixels, but claims more; make it smaller.",
        )


def _num_pixels(content: bytes) -> int:
    """What the header claims; pixels of a TIFF with more than four samples count accordingly."""
    if header := read_header(io.BytesIO(content)):
        return int(header.width) * int(header.height) * -(-header.num_samples // 4)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return image.width * image.height


def suffix_of(content: bytes) -> str:
    """The suffix for a picture's content."""
    return SUFFIXES.get(content[:2], ".tif")


def for_people(pixels: np.ndarray) -> Image.Image:
    """Pixels (H, W) or (H, W, C) in 8 bits and three channels, at most `LONGEST` long."""
    image = Image.fromarray(np.moveaxis(visible(to_planes(pixels)), 0, -1))
    image.thumbnail((LONGEST, LONGEST))
    return image


def overlaid(detector: Detector, content: bytes, found: Prediction) -> Image.Image:
    """What the detector has seen of a picture, with its anomalous pixels in red."""
    seen = for_people(detector.seen(content))
    if found.anomaly_map is None:
        return seen
    return overlay(np.asarray(seen), found.anomaly_map, found.threshold)


def as_jpeg(image: Image.Image) -> bytes:
    """A picture as a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
