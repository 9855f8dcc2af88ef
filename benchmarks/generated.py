"""Generated surfaces and parts with known defects and their masks, in the MVTec AD layout.

    python -m benchmarks.generated FOLDER [NAME ...] [--seed N]

Each NAME becomes a category of FOLDER, which can then be `data.root`: 128 normal images to train
on, 80 to test, and 70 with a small scratch and 70 with a large blotch. Light, place and texture
vary from image to image. The same seed gives the same pictures.

The defects are drawn by other code than those of `anomaly_detection.evaluation.synthetic`, with
other shapes, contrasts and soft edges, since they stand for the real ones.
"""

import argparse
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from skimage import data

from stages import run

SIDE = 320  # pixels
NUM_TRAIN, NUM_GOOD, NUM_DEFECTIVE = 128, 80, 70

Picture = np.ndarray  # float (SIDE, SIDE), mostly in [0, 255]
Generator = np.random.Generator


def main(*arguments: str) -> None:
    """Write the categories."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generated", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PRODUCTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(PRODUCTS):
        parser.error(f"NAME must be one of {', '.join(PRODUCTS)}, got {', '.join(unknown)}.")
    for name in options.names or PRODUCTS:
        write_generated(options.folder / name, name, options.seed)


def write_generated(
    folder: Path,
    name: str,
    seed: int = 0,
    *,
    num_train: int = NUM_TRAIN,
    num_good: int = NUM_GOOD,
    num_defective: int = NUM_DEFECTIVE,
) -> Path:
    """Write a category of grey PNG files, 320 x 320 pixels.

    Args:
        folder: The category's.
        name: One of PRODUCTS.
        seed: Draws everything.
        num_train: Normal images to train on.
        num_good: Normal images to test.
        num_defective: Images to test with a defect of each kind.
    """
    rng = np.random.default_rng([seed, list(PRODUCTS).index(name)])
    product = PRODUCTS[name]
    for split, count in (("train", num_train), ("test", num_good)):
        for i in range(count):
            _save(product.draw(rng), folder / split / "good" / f"{i:03}.png")
    for kind, add in DEFECTS.items():
        for i in range(num_defective):
            picture, mask = add(product.draw(rng), product.contrast, rng)
            _save(picture, folder / "test" / kind / f"{i:03}.png")
            _save(255.0 * mask, folder / "ground_truth" / kind / f"{i:03}_mask.png")
    return folder


def _save(picture: Picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.rint(picture).clip(0, 255).astype(np.uint8)
    Image.fromarray(values).save(path, compress_level=1)


def _noise(rng: Generator, scale: float | tuple[float, float]) -> Picture:
    """Smooth noise with details of `scale` pixels, mean 0 and standard deviation 1."""
    values = gaussian_filter(rng.normal(size=(SIDE, SIDE)), scale)
    return values / values.std()


def _light(rng: Generator, strength: float) -> Picture:
    """Light from one side: a plane with slopes of random sign."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    return strength * (rng.normal() * x + rng.normal() * y)


def _woven(rng: Generator) -> Picture:
    y, x = np.mgrid[:SIDE, :SIDE] + rng.uniform(0, 20, (2, 1, 1))
    x, y = (2 * math.pi / 13 * (z + 1.5 * _noise(rng, 20)) for z in (x, y))
    return 120 + 35 * np.sin(x) * np.sin(y) + 8 * _noise(rng, 1.2) + _light(rng, 12)


def _brushed(rng: Generator) -> Picture:
    return 140 + 18 * _noise(rng, (0.6, 25)) + 6 * _noise(rng, 30) + _light(rng, 12)


def _tile(rng: Generator) -> Picture:
    clouds = 10 * rng.uniform(0.3, 1) * _noise(rng, 40)
    return 110 + 9 * _noise(rng, 1) + 7 * _noise(rng, 8) + clouds + _light(rng, 20)


def _photographed(name: str) -> Callable[[Generator], Picture]:
    """Draws parts of one of scikit-image's photographs, half of them mirrored."""

    def draw(rng: Generator) -> Picture:
        photograph = getattr(data, name)()
        row, column = rng.integers(0, np.array(photograph.shape) - SIDE + 1)
        part = photograph[row : row + SIDE, column : column + SIDE].astype(float)
        part = part[:, ::-1] if rng.random() < 0.5 else part
        return part * rng.uniform(0.92, 1.08) + _light(rng, 6)

    return draw


def _flange(rng: Generator) -> Picture:
    """A round part with a large hole and six small ones, slightly shifted and turned."""
    canvas = Image.new("L", (SIDE, SIDE), 60)
    centre = SIDE / 2 + rng.normal(0, 2, 2)
    turn = rng.normal(0, 0.04)
    angles = turn + np.arange(6) * math.pi / 3
    holes = centre + 85 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    discs = [(centre, 120 + rng.normal(), 170), (centre, 40, 90)]
    discs += [(hole, 14, 40) for hole in holes]
    for (x, y), radius, grey in discs:
        ImageDraw.Draw(canvas).ellipse([x - radius, y - radius, x + radius, y + radius], fill=grey)
    part = gaussian_filter(np.asarray(canvas, float), 1.2)
    return part + 5 * _noise(rng, 1) + 6 * _noise(rng, 25) + _light(rng, 10)


@cache
def _layout() -> Picture:
    """Rectangles and lines at fixed places."""
    rng, canvas = np.random.default_rng(7), Image.new("L", (SIDE, SIDE), 70)
    pencil = ImageDraw.Draw(canvas)
    for _ in range(60):
        (x, y), (width, height) = rng.integers(0, SIDE, 2), rng.integers(6, 50, 2)
        pencil.rectangle([x, y, x + width, y + height], fill=int(rng.integers(60, 220)))
    for _ in range(40):
        x, y = rng.integers(0, SIDE, 2)
        end = x + rng.integers(-90, 90)
        pencil.line([x, y, end, y], fill=int(rng.integers(120, 230)), width=2)
    return np.asarray(canvas, float)


def _board(rng: Generator) -> Picture:
    """A populated board, up to 3 pixels off, more or less in focus."""
    shifted = np.roll(_layout(), rng.integers(-3, 4, 2), (0, 1))
    focused = gaussian_filter(shifted, 0.8 + 0.3 * rng.random())
    return focused * rng.uniform(0.93, 1.07) + 4 * _noise(rng, 0.8) + _light(rng, 8)


class Product(NamedTuple):
    """How one looks, and how much its defects differ from it, in grey levels."""

    draw: Callable[[Generator], Picture]
    contrast: float


PRODUCTS = {
    "woven": Product(_woven, 30),
    "brushed": Product(_brushed, 30),
    "tile": Product(_tile, 22),
    "brick": Product(_photographed("brick"), 40),
    "grass": Product(_photographed("grass"), 70),
    "gravel": Product(_photographed("gravel"), 70),
    "flange": Product(_flange, 25),
    "board": Product(_board, 40),
}


def _scratch(picture: Picture, contrast: float, rng: Generator) -> tuple[Picture, np.ndarray]:
    """A bright or dark curve, 20 to 60 pixels long and 1.5 to 2.5 wide, and its mask."""
    length, angle, bend = rng.uniform(20, 60), rng.uniform(0, math.pi), rng.normal(0, 0.1)
    along = length * np.linspace(-0.5, 0.5, 8)
    across = bend * (along**2 / length - length / 4)
    x, y = rng.uniform(0.2 * SIDE, 0.8 * SIDE, (2, 1))
    x = x + along * math.cos(angle) - across * math.sin(angle)
    y = y + along * math.sin(angle) + across * math.cos(angle)
    canvas = Image.new("L", (2 * SIDE, 2 * SIDE))
    points = [(2 * a, 2 * b) for a, b in zip(x, y, strict=True)]
    ImageDraw.Draw(canvas).line(points, fill=255, width=int(rng.integers(3, 6)))
    alpha = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), float) / 255
    change = contrast * rng.uniform(1.8, 4.0) * rng.choice([-1, 1])
    return picture + change * alpha, alpha > 0.3


def _blotch(picture: Picture, contrast: float, rng: Generator) -> tuple[Picture, np.ndarray]:
    """An irregular patch of radius 35 to 75 pixels, of another grey, focus or texture; its mask."""
    y, x = np.mgrid[:SIDE, :SIDE] - rng.uniform(0.25 * SIDE, 0.75 * SIDE, (2, 1, 1))
    distance = np.hypot(x, y) / rng.uniform(35, 75) + 0.25 * _noise(rng, 12)
    alpha = 1 / (1 + np.exp(10 * (distance - 1)))
    kind = rng.integers(3)
    if kind == 0:
        change = 0.8 * contrast * rng.uniform(0.7, 1.5) * rng.choice([-1, 1])
    elif kind == 1:
        change = gaussian_filter(picture, rng.uniform(1.5, 3.0)) - picture
    else:
        change = 0.6 * contrast * _noise(rng, rng.uniform(1.5, 4))
    return picture + alpha * change, alpha > 0.5


DEFECTS = {"scratch": _scratch, "blotch": _blotch}


if __name__ == "__main__":
    run(main)
