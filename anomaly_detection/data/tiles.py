"""Where the tiles of a large picture lie, and how what was found on each becomes one map."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """Square tiles that cover a picture, numbered along its rows.

    Attributes:
        height: Of the picture, in pixels.
        width: Likewise.
        side: Of the tiles.
        tops: The first pixel of each row of tiles.
        lefts: The first pixel of each column.
    """

    height: int
    width: int
    side: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def covering(cls, height: int, width: int, side: int, overlap: int = 0) -> "Grid":
        """As few tiles as share at least `overlap` pixels with their neighbours.

        In each direction the outermost ones end at the border, and all are evenly spaced.

        Raises:
            ValueError: The picture is smaller than a tile, or tiles would not move on.
        """
        if min(height, width) < side:
            raise ValueError(f"{width} x {height} pixels must be at least {side} x {side}.")
        if not 0 <= overlap < side:
            raise ValueError(f"overlap must be from 0 to {side - 1}, got {overlap}.")
        return cls(
            height, width, side, _starts(height, side, overlap), _starts(width, side, overlap)
        )

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def scaled(self, side: int) -> "Grid":
        """The grid of the picture at the scale that makes its tiles that large."""

        def at(value: int) -> int:
            return (2 * value * side + self.side) // (2 * self.side)  # rounded

        return Grid(
            at(self.height),
            at(self.width),
            side,
            tuple(map(at, self.tops)),
            tuple(map(at, self.lefts)),
        )

    def boxes(self) -> list[tuple[slice, slice]]:
        """The rows and columns of the picture that each tile has."""
        return [
            (slice(top, top + self.side), slice(left, left + self.side))
            for top, left in product(self.tops, self.lefts)
        ]

    def joined(self, tiles: Sequence[np.ndarray], numbers: Sequence[int]) -> np.ndarray:
        """The picture (height, width) that tiles (side, side) were cut from, 0 elsewhere.

        Args:
            tiles: At least one, of any dtype.
            numbers: Of these tiles, in the same order; not all need be there.
        """
        boxes, whole = self.boxes(), np.zeros((self.height, self.width), tiles[0].dtype)
        for number, tile in zip(numbers, tiles, strict=True):
            whole[boxes[number]] = tile
        return whole


class Blend:
    """One map of a whole picture, of its tiles' maps.

    Where tiles overlap, it is their mean, weighted by the distance from each tile's edge: there is
    no seam, and where all agree, that value stays.

    Args:
        grid: Where the tiles lie.

    Attributes:
        whole: The map, float32 (height, width); 0 where no tile has been added.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid, self.boxes = grid, grid.boxes()
        self.whole = np.zeros((grid.height, grid.width), np.float32)
        self._rows = _shares(grid.tops, grid.side, grid.height)
        self._columns = _shares(grid.lefts, grid.side, grid.width)

    def add(self, number: int, anomaly_map: np.ndarray) -> None:
        """Add the map (side, side) of the tile with this number, once each."""
        row, column = divmod(number, len(self.grid.lefts))
        part = self._rows[row][:, None] * anomaly_map * self._columns[column]
        self.whole[self.boxes[number]] += part


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of at most `size` items, in their order."""
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk


def _starts(length: int, side: int, overlap: int) -> tuple[int, ...]:
    steps = -(-(length - side) // (side - overlap))
    room = length - side
    return tuple((2 * i * room + steps) // (2 * steps) for i in range(steps + 1)) if steps else (0,)


def _shares(starts: Sequence[int], side: int, length: int) -> list[np.ndarray]:
    """What each tile's pixels count along an axis, float32 (side,); for a pixel, 1 in all."""
    ascending = np.arange(side) + 0.5
    from_edge = np.minimum(ascending, ascending[::-1])
    total = np.zeros(length)
    for start in starts:
        total[start : start + side] += from_edge
    return [(from_edge / total[start : start + side]).astype(np.float32) for start in starts]
