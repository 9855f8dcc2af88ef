"""Which part of a picture a detector sees, in which pieces and format, and what of it is judged."""

import base64
import io
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
from PIL import Image

from anomaly_detection.data.decode import decode_mask, resize_image, resize_mask, to_planes
from anomaly_detection.data.format import COLOUR, Format, scaled
from anomaly_detection.data.tiles import Grid
from anomaly_detection.errors import DataError

SQUARE, FIT, CROP = "square", "fit", "crop"
JUDGED = 255  # in the last channel, 65535 in one of 16 bits; 0 is outside
EACH = "each"  # in place of a mask: every picture comes with its own


class Frame:
    """Cuts pictures to the tiles that a model sees: the whole, as a square, or many at full size.

    Where only a part of that is judged, tiles get one more channel: JUDGED there, 0 elsewhere.

    Args:
        crop: Left, top, right and bottom in pixels, the latter two beyond the part that stays; None
            for the whole picture.
        resize: What becomes of a part that is not square: `square`, squeezed to one; `fit`,
            continued by its outermost pixels, which are not judged; or `crop`, cut to the square at
            its centre.
        mask: Bool or uint8 (H, W), as large as the pictures: not 0 where they are judged; None for
            everywhere, EACH if pictures need `with_mask`.
        tile_size: Side of the tiles in pixels, before they are resized; None for one tile, the
            whole, squeezed to a square where it is none.
        tile_overlap: Pixels that neighbouring tiles share at least.
        format: Of the tiles.
        size: Height and width that every picture must have after `cut`; None for any. It is given
            where the position of a tile says what is on it.
    """

    def __init__(
        self,
        crop: Sequence[int] | None = None,
        resize: str = SQUARE,
        mask: np.ndarray | str | None = None,
        tile_size: int | None = None,
        tile_overlap: int = 0,
        format: Format = COLOUR,
        size: Sequence[int] | None = None,
    ) -> None:
        self.crop, self.resize, self.mask, self.format = crop, resize, mask, format
        self.tile_size, self.tile_overlap, self.size = tile_size, tile_overlap, size

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "Frame":
        """The frame with these `options`."""
        mask = options.get("mask")
        return cls(
            options.get("crop"),
            options.get("resize", SQUARE),
            mask if mask in (None, EACH) else decode_mask(base64.b64decode(mask), "data.mask"),
            options.get("tile_size"),
            options.get("tile_overlap", 0),
            Format.from_options(options),
            options.get("size"),
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
        mask = self.mask
        if isinstance(mask, np.ndarray):
            file = io.BytesIO()
            Image.fromarray(mask.astype(bool)).save(file, "PNG")
            mask = base64.b64encode(file.getvalue()).decode()
        return {
            "crop": self.crop,
            "resize": self.resize,
            "mask": mask,
            "tile_size": self.tile_size,
            "tile_overlap": self.tile_overlap,
            "size": self.size,
            **self.format._asdict(),
        }

    def with_mask(self, mask: np.ndarray | None, name: object = "image") -> "Frame":
        """The frame for a picture with this mask (H, W), or with none of its own.

        Raises:
            DataError: There must be one and is none, or the reverse.
        """
        needs_mask = isinstance(self.mask, str)
        if needs_mask and mask is None:
            raise DataError(f"{name}: must have a mask, since the detector was fitted with masks.")
        if mask is None:
            return self
        if not needs_mask:
            raise DataError(f"{name}: must have no mask, since the detector was fitted without.")
        own = copy(self)
        own.mask = mask
        return own

    def tiles(
        self, pixels: np.ndarray, size: int | None, name: object = "image"
    ) -> Iterator[tuple[int, np.ndarray]]:
        """What the model sees of pixels (H, W) or (H, W, C), without tiles where nothing is judged.

        Args:
            pixels: Of a picture.
            size: Side of the square that tiles are resized to; None leaves them as they are.
            name: For messages.

        Yields:
            Each tile's number in the grid, and the tile, (`num_channels`, size, size).

        Raises:
            DataError: As in `cut`; the format has another number of channels, the picture is
                smaller than a tile, or nothing of it is judged.
        """
        image = self.cut(self.format.converted(pixels, name), name)
        region = self.region(pixels, name)
        is_empty = True
        for number, box in enumerate(self._boxes(image, name)):
            tile = to_planes(image[box]) if size is None else resize_image(image[box], size)
            if region is not None:
                judged = region[box] if size is None else resize_mask(region[box], size)
                if not judged.any():
                    continue
                tile = np.concatenate([tile, scaled(judged[None], tile.dtype)])
            is_empty = False
            yield number, tile
        if is_empty:
            raise DataError(f"{name}: a part must be judged, but data.mask leaves none of it.")

    def grid(self, height: int, width: int, size: int) -> Grid:
        """Where tiles that are resized to `size` lie on a picture of that size after `cut`."""
        if self.tile_size is None:
            return Grid.covering(size, size, size)
        return Grid.covering(height, width, self.tile_size, self.tile_overlap).scaled(size)

    def cut_mask(self, mask: np.ndarray, size: int, numbers: Sequence[int]) -> list[np.ndarray]:
        """The tiles with these numbers of a defect's mask (H, W): uint8 (size, size) each."""
        mask = self.cut(mask, outside=0)
        boxes = self._boxes(mask)
        return [resize_mask(mask[boxes[number]], size) for number in numbers]

    def region(self, pixels: np.ndarray, name: object = "image") -> np.ndarray | None:
        """Where pixels are judged after `cut`, uint8 (h, w); None for everywhere.

        Raises:
            DataError: As in `cut`.
        """
        if self.judges_all:
            return None
        judged = np.full(pixels.shape[:2], JUDGED, np.uint8)
        if isinstance(self.mask, np.ndarray):
            judged[self.mask == 0] = 0
        return self.cut(judged, name, outside=0)

    def cut(
        self, pixels: np.ndarray, name: object = "image", outside: int | None = None
    ) -> np.ndarray:
        """The part of pixels (H, W) or (H, W, C) that is seen.

        Args:
            pixels: Of a picture, or of its mask.
            name: For messages.
            outside: What continues a part for `fit`; None for its outermost pixels.

        Raises:
            DataError: The picture is too small for `crop`, or has another size than the mask.
        """
        height, width = pixels.shape[:2]
        if isinstance(self.mask, np.ndarray) and self.mask.shape != (height, width):
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

    def _boxes(self, image: np.ndarray, name: object = "image") -> list[tuple[slice, slice]]:
        """The rows and columns of each tile."""
        if self.tile_size is None:
            return [(slice(None), slice(None))]
        height, width = image.shape[:2]
        if self.size and tuple(self.size) != (height, width):
            raise DataError(
                f"{name}: must have {self.size[1]} x {self.size[0]} pixels like all images of "
                f"the detector, got {width} x {height}."
            )
        if min(height, width) < self.tile_size:
            raise DataError(
                f"{name}: must be at least {self.tile_size} x {self.tile_size} pixels for "
                f"data.tile_size, got {width} x {height}."
            )
        return Grid.covering(height, width, self.tile_size, self.tile_overlap).boxes()
