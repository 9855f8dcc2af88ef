"""The format of a category's pictures: how many channels they have, and how many bits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anomaly_detection.data.decode import channels_and_depth
from anomaly_detection.data.threads import in_threads
from anomaly_detection.errors import DataError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of RGB in [0, 1]


class Format(NamedTuple):
    """What the pictures of a category are brought to.

    Attributes:
        channels: 3 for colour and for grey, which is repeated; or 4.
        dtype: `uint8`, or `uint16`, whose full scale is 65535 whatever the camera's is.
    """

    channels: int = 3
    dtype: str = "uint8"

    @property
    def full_scale(self) -> int:
        """The highest value of its dtype."""
        return int(np.iinfo(self.dtype).max)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Format":
        """The format that a file's options name; older files name none, and mean the default."""
        return cls(**{key: options[key] for key in cls._fields if key in options})

    def converted(self, pixels: np.ndarray, name: object = "image") -> np.ndarray:
        """Pixels (H, W) or (H, W, C) in this format, 8 bits scaled to 16 exactly if it has 16.

        Raises:
            DataError: They have another number of channels.
        """
        channels = pixels.shape[2] if pixels.ndim == 3 else 3
        if channels != self.channels:
            raise DataError(
                f"{name}: must have {self.channels} channels like the images of its category, got "
                f"{channels} (grey counts as 3); convert or remove it."
            )
        return scaled(pixels, self.dtype)


COLOUR = Format()


def common_format(paths: Sequence[Path]) -> Format:
    """The format for these files, by their headers alone: no pixel is decoded.

    It has the number of channels that most have, and 16 bits if any file has more than 8. Files
    that cannot be read do not count; `decode_image` says what is wrong with them.
    """
    known = [x for x in in_threads(channels_and_depth, paths, ahead=64) if x is not None]
    counts = Counter(channels for channels, _ in known)
    is_deep = any(deep for _, deep in known)
    return Format(4 if counts[4] > counts[3] else 3, "uint16" if is_deep else "uint8")


def scaled(values: np.ndarray, dtype: str | np.dtype) -> np.ndarray:
    """uint8 values as uint16 of the same share of full scale, 257 times as much; others as are."""
    if values.dtype == np.uint8 and np.dtype(dtype) == np.uint16:
        return values.astype(np.uint16) * np.uint16(257)
    return values


def visible(planes: np.ndarray) -> np.ndarray:
    """What people are shown of pictures (..., C, H, W): the upper 8 bits of the first 3 channels.

    Returns:
        uint8 (..., 3, H, W).
    """
    colours = planes[..., :3, :, :]
    return colours if colours.dtype == np.uint8 else (colours >> 8).astype(np.uint8)


def per_channel(values: Sequence[float], channels: int) -> list[float]:
    """The values for red, green and blue, and their mean for further channels."""
    return [*values, *[sum(values) / len(values)] * (channels - len(values))]
