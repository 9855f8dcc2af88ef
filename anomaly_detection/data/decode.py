"""The only path from a file's bytes to pixels of the trained size; uses Pillow and NumPy alone.

Pillow resizes with integers, so an image gives the same pixels on every machine.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from anomaly_detection.data.sample import Sample
from anomaly_detection.errors import DataError, one_line

WHOLE = 16  # significant bits of images that use their full depth
FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # Pillow's names; a file's content decides, not its name
MAX_PIXELS = 100_000_000  # 300 MB in colour


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: must be readable: {error.strerror}.") from None


def content_hash(content: bytes) -> str:
    """SHA-256 in hexadecimal digits, which identifies an image."""
    return hashlib.sha256(content).hexdigest()


def decode_image(content: bytes, name: str | Path, bit_depth: int = WHOLE) -> np.ndarray:
    """The pixels of an image file, turned upright.

    Args:
        content: A file's bytes, in one of `FORMATS`.
        name: For error messages.
        bit_depth: Significant bits of images with more than 8.

    Returns:
        uint8 (H, W) for a grey image, (H, W, 3) for a colour one.

    Raises:
        DataError: It cannot be decoded, has more than `MAX_PIXELS`, or values beyond `bit_depth`
            bits.
    """
    image = _open(content, name)
    if bit_depth < WHOLE and not image.mode.startswith(("I", "F")):
        _refuse_16_bit_channels(content, image, name, bit_depth)
    return pixels_of(image, name, bit_depth)


def pixels_of(image: Image.Image, name: str | Path, bit_depth: int = WHOLE) -> np.ndarray:
    """The pixels of a picture, as `decode_image` gives them; already upright.

    Raises:
        DataError: The values are floating point or beyond `bit_depth` bits.
    """
    if image.mode == "F":
        raise DataError(f"{name}: must have 8 or 16 bits, got floating point; convert it.")
    if image.mode.startswith("I"):
        return _scale(np.asarray(image), name, bit_depth)
    grey = image.mode in ("1", "L", "LA")
    return np.array(image.convert("L" if grey else "RGB"))


def decode_mask(content: bytes, name: str | Path) -> np.ndarray:
    """The mask as uint8 (H, W): 1 wherever it is not 0.

    Raises:
        DataError: It cannot be decoded.
    """
    mask = _open(content, name)
    values = np.asarray(mask.convert("RGB") if mask.mode in ("P", "CMYK") else mask)
    if mask.mode in ("LA", "RGBA"):
        values = values[..., :-1]
    anomalous = values.any(axis=2) if values.ndim == 3 else values != 0
    return np.asarray(anomalous, dtype=np.uint8)


def read_pixels(sample: Sample, bit_depth: int) -> tuple[np.ndarray, np.ndarray | None, str]:
    """A sample's image (H, W) or (H, W, 3), its mask (H, W) if it has one, and the content's hash.

    Raises:
        DataError: A file is unreadable or truncated, has values beyond `bit_depth` bits, or the
            mask's size differs from the image's.
    """
    content = read_file(sample.path)
    image = decode_image(content, sample.path, bit_depth)
    mask = None
    if sample.mask_path:
        mask = decode_mask(read_file(sample.mask_path), sample.mask_path)
        if mask.shape != image.shape[:2]:
            raise DataError(
                f"{sample.mask_path}: a mask must be as large as its image, got "
                f"{_size(mask)} pixels for {sample.path.name} of {_size(image)}."
            )
    return image, mask, content_hash(content)


def resize_image(pixels: np.ndarray, size: int) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3) as uint8 (3, size, size): bilinear, antialiased when shrinking."""
    resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
    return to_planes(np.asarray(resized))


def to_planes(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3) as (3, H, W), grey ones three times."""
    planes = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    return np.broadcast_to(planes, (3, *planes.shape[1:]))


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask (H, W) as uint8 (size, size), by nearest neighbour."""
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def _open(content: bytes, name: str | Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:  # Pillow itself raises it for even more pixels
        raise DataError(
            f"{name}: must have at most {MAX_PIXELS:,} pixels, but claims more; make it smaller."
        ) from None
    except Exception as error:  # a damaged file can raise anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"none of {', '.join(FORMATS)}" if unknown else one_line(error)
        raise DataError(
            f"{name}: must be a whole image, but cannot be decoded ({reason}); "
            "replace or remove it."
        ) from None


def _scale(values: np.ndarray, name: str | Path, bit_depth: int) -> np.ndarray:
    """Grey values of `bit_depth` bits, scaled to uint8."""
    limit = 2**bit_depth - 1
    if values.min() < 0:
        raise DataError(f"{name}: values must not be negative, got {values.min()}; convert it.")
    if values.max() > limit:
        raise DataError(
            f"{name}: values must be at most {limit} with data.bit_depth {bit_depth}, "
            f"got {values.max()}; raise data.bit_depth."
        )
    return np.rint(values * (255 / limit)).astype(np.uint8)


def _refuse_16_bit_channels(
    content: bytes, image: Image.Image, name: str | Path, bit_depth: int
) -> None:
    """Raise a DataError if Pillow has cut 16 bits to 8, as it does with all but plain grey."""
    if content.startswith(b"\x89PNG"):
        bits = content[24]  # in the header
    else:
        bits = max(np.ravel(getattr(image, "tag_v2", {}).get(258, 8)))  # TIFF's BitsPerSample
    if bits > 8:
        raise DataError(
            f"{name}: colour of 16 bits must use all of them, since only the upper 8 are read; "
            f"data.bit_depth {bit_depth} is for grey images. Convert it to 8 bits."
        )


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
