"""The only path from a file's bytes to pixels of the trained size.

Pillow reads the files and resizes, but for TIFFs that it cannot read whole (see `tiff`). It resizes
8 bits with integers, and 16 bits in double precision with integers for result, so an image gives
the same pixels on every machine.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from anomaly_detection.data.sample import Sample
from anomaly_detection.data.tiff import Header, read_channels, read_header
from anomaly_detection.errors import DataError, one_line

WHOLE = 16  # significant bits of images that use their full depth
FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # Pillow's names; a file's content decides, not its name
DEEP = ("I", "F")  # how the names of Pillow's modes with more than 8 bits begin
MAX_PIXELS = 100_000_000  # 300 MB in colour of 8 bits


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


def decode_image(
    content: bytes, name: str | Path, bit_depth: int = WHOLE, dtype: str = "uint8"
) -> np.ndarray:
    """The pixels of an image file, turned upright, without alpha.

    Args:
        content: A file's bytes, in one of `FORMATS`.
        name: For error messages.
        bit_depth: Significant bits of images with more than 8.
        dtype: What these are scaled to, uint8 or uint16.

    Returns:
        (H, W) for a grey image, (H, W, 3) for a colour one, (H, W, 4) for a TIFF with a fourth
        channel that is not alpha; of `dtype` with more than 8 bits, else uint8.

    Raises:
        DataError: It cannot be decoded, has more than `MAX_PIXELS`, values beyond `bit_depth` bits,
            or colours of 16 bits in a file of which only 8 can be read.
    """
    with _reading(name):
        header = read_header(io.BytesIO(content))
        if header and header.exceeds_pillow:
            _limit(header.width, header.height)
            return _scale(read_channels(content, header, name), name, bit_depth, dtype)
    image = _open(content, name)
    _refuse_cut_bits(content, header, image, name)
    return pixels_of(image, name, bit_depth, dtype)


def pixels_of(
    image: Image.Image, name: str | Path, bit_depth: int = WHOLE, dtype: str = "uint8"
) -> np.ndarray:
    """The pixels of a picture, as `decode_image` gives them; already upright.

    Raises:
        DataError: The values are floating point or beyond `bit_depth` bits.
    """
    if image.mode.startswith(DEEP):
        return _scale(np.asarray(image), name, bit_depth, dtype)
    grey = image.mode in ("1", "L", "LA")
    return np.array(image.convert("L" if grey else "RGB"))


def channels_and_depth(path: Path) -> tuple[int, bool] | None:
    """What a file's header says, without decoding a pixel.

    Returns:
        The number of channels, 3 for a grey image, and whether they have more than 8 bits; None if
        the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = read_header(file)
            if header and header.exceeds_pillow:
                return max(3, len(header.channels)), header.bits > 8
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                return 3, image.mode.startswith(DEEP)
    except Exception:  # a damaged file can raise anything; decoding it says what is wrong
        return None


def decode_mask(content: bytes, name: str | Path) -> np.ndarray:
    """The mask as uint8 (H, W): 1 wherever it is not 0.

    Raises:
        DataError: It cannot be decoded.
    """
    return mask_pixels(_open(content, name))


def mask_pixels(mask: Image.Image) -> np.ndarray:
    """As `decode_mask`, of a picture that is upright."""
    values = np.asarray(mask.convert("RGB") if mask.mode in ("P", "CMYK") else mask)
    if mask.mode in ("LA", "RGBA"):
        values = values[..., :-1]
    anomalous = values.any(axis=2) if values.ndim == 3 else values != 0
    return np.asarray(anomalous, dtype=np.uint8)


def read_pixels(
    sample: Sample, bit_depth: int, dtype: str = "uint8"
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """A sample's image, its mask (H, W) if it has one, and the content's hash.

    Args:
        sample: The image.
        bit_depth: As in `decode_image`.
        dtype: As in `decode_image`.

    Raises:
        DataError: A file is unreadable or truncated, has values beyond `bit_depth` bits, or the
            mask's size differs from the image's.
    """
    content = read_file(sample.path)
    image = decode_image(content, sample.path, bit_depth, dtype)
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
    """Pixels (H, W) or (H, W, C) as (C, size, size): bilinear, antialiased when shrinking.

    Grey ones become three channels. The dtype, uint8 or uint16, stays.
    """
    if pixels.ndim == 2 or (pixels.dtype == np.uint8 and pixels.shape[2] == 3):
        return to_planes(_resized(pixels, size))
    # Pillow has no colours of 16 bits, and would multiply the others by a fourth channel.
    return np.stack([_resized(plane, size) for plane in to_planes(pixels)])


def _resized(pixels: np.ndarray, size: int) -> np.ndarray:
    resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def to_planes(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) as (C, H, W), grey ones three times."""
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (3, *pixels.shape))
    return np.moveaxis(pixels, -1, 0)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask (H, W) as uint8 (size, size), by nearest neighbour."""
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def _open(content: bytes, name: str | Path) -> Image.Image:
    with _reading(name):
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _limit(image.width, image.height)
        image.load()
        return ImageOps.exif_transpose(image)


@contextlib.contextmanager
def _reading(name: str | Path) -> Iterator[None]:
    """Make a DataError of whatever a damaged file raises in the block."""
    try:
        yield
    except DataError:
        raise
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


def _limit(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError


def _scale(values: np.ndarray, name: str | Path, bit_depth: int, dtype: str) -> np.ndarray:
    """Values of `bit_depth` bits, scaled to the full range of `dtype`; uint8 ones as they are."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f":
        raise DataError(f"{name}: must have 8 or 16 bits, got floating point; convert it.")
    limit = 2**bit_depth - 1
    if values.min() < 0:
        raise DataError(f"{name}: values must not be negative, got {values.min()}; convert it.")
    if values.max() > limit:
        raise DataError(
            f"{name}: values must be at most {limit} with data.bit_depth {bit_depth}, "
            f"got {values.max()}; raise data.bit_depth."
        )
    full_scale = np.iinfo(dtype).max
    scaled = values if full_scale == limit else np.rint(values * (full_scale / limit))
    return scaled.astype(dtype)


def _refuse_cut_bits(
    content: bytes, header: Header | None, image: Image.Image, name: str | Path
) -> None:
    """Raise a DataError if Pillow has cut colours of 16 bits to 8."""
    bits = header.bits if header else 8
    if content.startswith(b"\x89PNG"):
        bits = content[24]  # in its header
    if bits > 8 and not image.mode.startswith(DEEP):
        raise DataError(
            f"{name}: colours of 16 bits must be in a TIFF as RGB, since of others only 8 bits can "
            "be read; convert it to that, or to 8 bits."
        )


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
