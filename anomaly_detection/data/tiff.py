"""TIFFs that Pillow does not read whole: it cuts colours to 8 bits, and drops a fourth channel.

tifffile reads them instead. It is imported only for them.
"""

import io
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from anomaly_detection.errors import DataError

BIG = b"II+\0"  # BigTIFF; Pillow does not read the big-endian one
BEGINNINGS = (b"II*\0", b"MM\0*", BIG)
ALPHA = (1, 2)  # kinds of ExtraSamples, premultiplied or not
NUM_CHANNELS = (1, 3, 4)


class Header(NamedTuple):
    """What a TIFF says of its first picture.

    Attributes:
        width: In pixels.
        height: In pixels.
        bits: Of the deepest sample.
        is_plain: Whether samples are grey values or RGB, and no palette, CMYK or YCbCr.
        orientation: As in EXIF, 1 to 8; 1 is upright.
        num_samples: Of a pixel.
        channels: The indices of the samples that are not alpha.
    """

    width: int
    height: int
    bits: int
    is_plain: bool
    orientation: int
    num_samples: int
    channels: list[int]

    @property
    def exceeds_pillow(self) -> bool:
        """Whether Pillow would lose something of the picture."""
        deep = self.bits > 8 and self.num_samples > 1
        return self.is_plain and (deep or len(self.channels) > 3)


def read_header(file: BinaryIO) -> Header | None:
    """The header of a TIFF, without decoding a pixel; None for another kind of file.

    A damaged header may raise anything.
    """
    start = file.read(8)
    if start[:4] not in BEGINNINGS:
        return None
    if start[:4] == BIG:
        start += file.read(8)
    tags = ImageFileDirectory_v2(start)
    file.seek(tags.next)
    tags.load(file)
    num_samples = tags.get(277, 1)
    extra = tags.get(338, ())[-num_samples:]
    kinds = [0] * (num_samples - len(extra)) + list(extra)
    return Header(
        width=tags[256],
        height=tags[257],
        bits=max(np.ravel(tags.get(258, 1))),
        is_plain=tags.get(262) in (1, 2),
        orientation=tags.get(274, 1),
        num_samples=num_samples,
        channels=[i for i, kind in enumerate(kinds) if kind not in ALPHA],
    )


def read_channels(content: bytes, header: Header, name: str | Path) -> np.ndarray:
    """The first picture's values as they are, upright: (H, W), (H, W, 3) or (H, W, 4).

    A damaged file may raise anything.

    Raises:
        DataError: The number of channels is another one, or a package is missing.
    """
    if len(header.channels) not in NUM_CHANNELS:
        raise DataError(
            f"{name}: must have 1, 3 or 4 channels besides alpha, got {len(header.channels)}; "
            "convert it."
        )
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page = file.pages[0]
            values, axes = page.asarray(maxworkers=1), page.axes
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        raise DataError(
            f"{name}: its compression needs a package, pip install imagecodecs; or save it with "
            "Deflate or without compression."
        ) from None
    values = np.moveaxis(values, axes.index("S"), -1)[..., header.channels]
    return _upright(values[..., 0] if len(header.channels) == 1 else values, header.orientation)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, ...) turned as EXIF's orientation says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
