"""Small data sets in the MVTec AD layout, written to disk."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_image(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that two workers end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def category(tmp_path: Path) -> Path:
    """A whole category with masks, `<tmp_path>/data/widget`."""
    return write_category(tmp_path / "data" / "widget")
