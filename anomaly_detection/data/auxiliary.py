"""Images of anything but the product, for models that learn what it does not look like."""

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from anomaly_detection.data.decode import decode_image, read_file, resize_image
from anomaly_detection.data.layout import pictures_in


class AuxiliaryDataset(Dataset):
    """All images below a folder, decoded when asked for.

    Items are dicts with `image`, uint8 (3, S, S), and `path`, relative to the folder.

    Args:
        folder: Searched with its subfolders.
        image_size: Side S in pixels; images become squares.
    """

    def __init__(self, folder: str | Path, image_size: int) -> None:
        self.folder, self.image_size = Path(folder), image_size
        self.paths = pictures_in(self.folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        pixels = decode_image(read_file(path), path)
        image = torch.tensor(resize_image(pixels, self.image_size))
        return {"image": image, "path": path.relative_to(self.folder).as_posix()}


def write_photographs(folder: Path) -> None:
    """Write the two photographs of scikit-learn (CC BY)."""
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("sklearn.datasets.images")) as source:
        for path in pictures_in(source):
            shutil.copyfile(path, folder / path.name)
