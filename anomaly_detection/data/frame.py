"""Which part of a picture a detector sees, in which format, and which part of that it judges."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from anomaly_detection.data.decode import decode_mask, resize_image, resize_mask, to_planes
from anomaly_detection.data.format import COLOUR, Format, scaled
from anomaly_detection.errors import DataError

SQUARE, FIT, CROP = "square", "fit", "crop"
JUDGED = 255  # in the last channel, 65535 in one of 16 bits; 0 is outside


class Frame:
    """Cuts pictures to what a detector sees, before they are resized to a square.

    Where only a part of that is judged, pictures get one more channel: JUDGED there, 0 elsewhere.

    Args:
        crop: Left, top, right and bottom in pixels, the latter two beyond the part that stays; None
            for the whole picture.
        resize: What becomes of a part that is not square: `square`, squeezed to one; `fit`,
            continued by its outermost pixels, which are not judged; or `crop`, cut to the square at
            its centre.
        mask: Bool or uint8 (H, W), as large as the pictures: not 0 where they are judged; None for
            everywhere.
        format: Of what the detector sees.
    """

    def __init__(
        self,
        crop: Sequence[int] | None = None,
        resize: str = SQUARE,
        mask: np.ndarray | None = None,
        format: Format = COLOUR,
    ) -> None:
        self.crop, self.resize, self.mask, self.format = crop, resize, mask, format

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "Frame":
        """The frame with these `options`."""
        mask = options.get("mask")
        return cls(
            options.get("crop"),
            options.get("resize", SQUARE),
            None if mask is None else decode_mask(base64.b64decode(mask), "data.mask"),
            Format.from_options(options),
        )

    @property
    def judges_all(self) -> bool:
        """Whether every pixel is judged."""
        return self.mask is None and self.resize != FIT

    @property
    def num_channels(self) -> int:
        """The format's, and one more where only a part is judged."""
        return self.format.channels + (not self.judges_all)

    @property
    def options(self) -> dict[str, Any]:
        """What a file has of it: the arguments, the mask as a PNG in base64, the format's parts."""
        mask = None
        if self.mask is not None:
            file = io.BytesIO()
            Image.fromarray(self.mask.astype(bool)).save(file, "PNG")
            mask = base64.b64encode(file.getvalue()).decode()
        return {"crop": self.crop, "resize": self.resize, "mask": mask, **self.format._asdict()}

    def resized(self, pixels: np.ndarray, size: int, name: object = "image") -> np.ndarray:
        """What the model sees of pixels (H, W) or (H, W, C): (`num_channels`, size, size).

        Raises:
            DataError: As in `cut`, or the format has another number of channels.
        """
        image = resize_image(self.cut(self.format.converted(pixels, name), name), size)
        region = self.region(pixels, name)
        return image if region is None else _with(image, resize_mask(region, size))

    def planes(self, pixels: np.ndarray, name: object = "image") -> np.ndarray:
        """The same at its full resolution: (`num_channels`, h, w).

        Raises:
            DataError: As in `resized`.
        """
        image = to_planes(self.cut(self.format.converted(pixels, name), name))
        region = self.region(pixels, name)
        return image if region is None else _with(image, region)

    def region(self, pixels: np.ndarray, name: object = "image") -> np.ndarray | None:
        """Where pixels are judged after `cut`, uint8 (h, w); None for everywhere.

        Raises:
            DataError: As in `cut`.
        """
        if self.judges_all:
            return None
        judged = np.full(pixels.shape[:2], JUDGED, np.uint8)
        if self.mask is not None:
            judged[self.mask == 0] = 0
        return self.cut(judged, name, outside=0)

    def cut(
        self, pixels: np.ndarray, name: object = "image", outside: int | None = None
    ) -> np.ndarray:
        """The part of pixels (H, W) or (H, W, C) to be resized.

        Args:
            pixels: Of a picture, or of its mask.
            name: For messages.
            outside: What continues a part for `fit`; None for its outermost pixels.

        Raises:
            DataError: The picture is too small for `crop`, or has another size than the mask.
        """
        height, width = pixels.shape[:2]
        if self.mask is not None and self.mask.shape != (height, width):
            raise DataError(
                f"{name}: must be as large as data.mask, {self.mask.shape[1]} x "
                f"{self.mask.shape[0]} pixels, got {width} x {height}."
            )
        if self.crop is not None:
            left, top, right, bottom = self.crop
            if right > width or bottom > height:
                raise DataError(
                    f"{name}: must be at least {right} x {bottom} pixels for data.crop, got "
                    f"{width} x {height}."
                )
            pixels = pixels[top:bottom, left:right]
        height, width = pixels.shape[:2]
        if self.resize == CROP:
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            pixels = pixels[top : top + side, left : left + side]
        elif self.resize == FIT:
            missing = [max(height, width) - x for x in (height, width)]
            around = [(x // 2, x - x // 2) for x in missing] + [(0, 0)] * (pixels.ndim - 2)
            if outside is None:
                pixels = np.pad(pixels, around, mode="edge")
            else:
                pixels = np.pad(pixels, around, constant_values=outside)
        return pixels


def _with(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    return np.concatenate([image, scaled(region[None], image.dtype)])
