"""Small data sets in the MVTec AD layout, written to disk."""

from pathlib import Path

import numpy as np
from PIL import Image

from anomaly_detection.data import prepare_category


def write_image(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def random_pixels(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def write_category(
    folder: Path, *, size: int = 64, num_train: int = 24, num_test: int = 4, masks: bool = True
) -> Path:
    """Noisy grey squares; the defect types `bright` and `dark` have a spot with a mask."""
    rng = np.random.default_rng(sum(map(ord, folder.name)))

    def texture() -> np.ndarray:
        return rng.normal(128, 8, (size, size, 3)).clip(0, 255).astype(np.uint8)

    for i in range(num_train):
        write_image(folder / "train" / "good" / f"{i:03}.png", texture())
    for i in range(num_test):
        write_image(folder / "test" / "good" / f"{i:03}.png", texture())
    for defect_type, value in (("bright", 250), ("dark", 5)):
        for i in range(num_test):
            image, mask = texture(), np.zeros((size, size), np.uint8)
            row, column = rng.integers(0, size - 16, 2)
            image[row : row + 16, column : column + 16] = value
            mask[row : row + 16, column : column + 16] = 255
            write_image(folder / "test" / defect_type / f"{i:03}.png", image)
            if masks:
                write_image(folder / "ground_truth" / defect_type / f"{i:03}_mask.png", mask)
    return folder


def prepare(folder: Path, category: str = "widget", **options) -> Path:
    """Prepare a category of `folder` at 64 pixels; returns `<folder>/prepared/<category>`."""
    values = {"image_size": 64, "bit_depth": 16, "seed": 0}
    values |= {"validation_fraction": 0.15, "calibration_fraction": 0.15} | options
    prepared = folder / "prepared" / category
    prepare_category(folder, category, prepared, **values)
    return prepared
