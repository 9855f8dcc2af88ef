"""Images of anything but the product, for models that learn what it does not look like."""

import shutil
from pathlib import Path
from typing import Any

import torch
from skimage.data import data_dir
from torch.utils.data import Dataset

from anomaly_detection.data.decode import decode_image, read_file, resize_image
from anomaly_detection.data.sample import pictures_in

KEPT = 2**28  # bytes of decoded images
NAMES = (  # those that come with scikit-image, but its textures: products look like these
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "retina.jpg",
    "rocket.jpg",
)


class AuxiliaryDataset(Dataset):
    """All images below a folder, decoded when asked for; up to 256 MB of them are kept.

    Items are dicts with `image`, uint8 (3, S, S), and `path`, relative to the folder.

    Args:
        folder: Searched with its subfolders.
        image_size: Side S in pixels; images become squares.
    """

    def __init__(self, folder: str | Path, image_size: int) -> None:
        self.folder, self.image_size = Path(folder), image_size
        self.paths = pictures_in(self.folder)
        self._kept: dict[Path, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        if (image := self._kept.get(path)) is None:
            pixels = decode_image(read_file(path), path)
            image = torch.tensor(resize_image(pixels, self.image_size))
            if len(self._kept) < KEPT // image.numel():
                self._kept[path] = image
        return {"image": image, "path": path.relative_to(self.folder).as_posix()}


def write_photographs(folder: Path) -> None:
    """Write scikit-image's photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        shutil.copyfile(Path(data_dir) / name, folder / name)
