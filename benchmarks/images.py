"""Generated images in the MVTec AD layout: smooth noise, with bright spots as defects."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, num_train: int, num_test: int, side: int, seed: int = 0) -> Path:
    """Write a category: `num_train` normal images, and `num_test` test images, half with defects.

    All are grey PNG files of `side` x `side` pixels, and each defect has a mask.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]

    def save(values: np.ndarray, *parts: str) -> None:
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path, compress_level=1)

    def texture() -> np.ndarray:
        coarse = rng.integers(90, 160, (8, 8), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
        return smooth + rng.integers(0, 16, (side, side), dtype=np.uint8)

    for i in range(num_train):
        save(texture(), "train", "good", f"{i:06}.png")
    for i in range(num_test):
        image = texture()
        if i % 2:
            row, column = rng.uniform(0.2 * side, 0.8 * side, 2)
            spot = np.hypot(x - column, y - row) < 0.05 * side
            image[spot] = 250
            save(image, "test", "spot", f"{i:06}.png")
            save(spot.astype(np.uint8) * 255, "ground_truth", "spot", f"{i:06}_mask.png")
        else:
            save(image, "test", "good", f"{i:06}.png")
    return folder
