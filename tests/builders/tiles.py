"""Images of 90 x 130 pixels, large enough for twelve tiles of 48."""

from pathlib import Path

import numpy as np

from builders.images import prepare, write_image

SHAPE = (90, 130)


def write_textures(
    folder: Path, count: int = 20, size: tuple[int, int] = SHAPE, colour: bool = True, seed: int = 0
) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(count):
        shape = (*size, 3) if colour else size
        write_image(folder / f"{i:02}.png", rng.integers(100, 140, shape, np.uint8))
    return folder


def write_defects(folder: Path, masks: bool = True) -> Path:
    """A category whose test images have a bright spot that four tiles share, and its masks."""
    rng = np.random.default_rng(1)
    write_textures(folder / "train" / "good")
    write_textures(folder / "test" / "good", 3, seed=2)
    for i in range(3):
        image, mask = rng.integers(100, 140, (*SHAPE, 3), np.uint8), np.zeros(SHAPE, np.uint8)
        image[42:50, 40:46] = 255
        mask[42:50, 40:46] = 255
        write_image(folder / "test" / "spot" / f"{i}.png", image)
        if masks:
            write_image(folder / "ground_truth" / "spot" / f"{i}_mask.png", mask)
    return folder


def prepare_tiles(folder: Path, **options) -> Path:
    """Prepare `<folder>/part` in tiles of 48 pixels that are resized to 32."""
    fractions = {"validation_fraction": 0.2, "calibration_fraction": 0.2, "test_fraction": 0.2}
    values = {"image_size": 32, "tile_size": 48, "tile_overlap": 8}
    return prepare(folder, "part", **fractions | values | options)
