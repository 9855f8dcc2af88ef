"""Which part of a picture a detector sees."""

from collections.abc import Sequence

import numpy as np

from anomaly_detection.errors import DataError

SQUARE, CROP = "square", "crop"


class Frame:
    """Cuts pictures to what a detector sees, before they are resized to a square.

    Args:
        crop: Left, top, right and bottom in pixels, the latter two beyond the part that stays; None
            for the whole picture.
        resize: What becomes of a part that is not square: `square`, squeezed to one, or `crop`, cut
            to the square at its centre.
    """

    def __init__(self, crop: Sequence[int] | None = None, resize: str = SQUARE) -> None:
        self.crop, self.resize = crop, resize

    def cut(self, pixels: np.ndarray, name: object = "image") -> np.ndarray:
        """The part of pixels (H, W) or (H, W, 3) to be resized, as a view.

        Raises:
            DataError: The picture does not reach as far as `crop`.
        """
        if self.crop is not None:
            left, top, right, bottom = self.crop
            height, width = pixels.shape[:2]
            if right > width or bottom > height:
                raise DataError(
                    f"{name}: must be at least {right} x {bottom} pixels for data.crop, got "
                    f"{width} x {height}."
                )
            pixels = pixels[top:bottom, left:right]
        if self.resize == CROP:
            height, width = pixels.shape[:2]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            pixels = pixels[top : top + side, left : left + side]
        return pixels
