"""Images of anything but the product, for models that learn what it does not look like."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.data import data_dir
from torch.utils.data import Dataset

from anomaly_detection.data.decode import decode_image, read_file, resize_image
from anomaly_detection.data.sample import pictures_in

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
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

    Items are dicts with `image`, uint8 (C, S, S), and `path`, relative to the folder.

    Args:
        folder: Searched with its subfolders.
        image_size: Side S in pixels; images become squares.
        channels: C. The fourth, where an image has none, is its luminance.
    """

    def __init__(self, folder: str | Path, image_size: int, channels: int = 3) -> None:
        self.folder, self.image_size, self.channels = Path(folder), image_size, channels
        self.paths = pictures_in(self.folder)
        self._kept: dict[Path, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        if (image := self._kept.get(path)) is None:
            pixels = decode_image(read_file(path), path)
            image = torch.tensor(self._with_channels(resize_image(pixels, self.image_size)))
            if len(self._kept) < KEPT // image.numel():
                self._kept[path] = image
        return {"image": image, "path": path.relative_to(self.folder).as_posix()}

    def _with_channels(self, planes: np.ndarray) -> np.ndarray:
        if len(planes) < self.channels:
            luminance = np.rint(np.tensordot(LUMINANCE, planes, axes=1)).astype(np.uint8)
            planes = np.concatenate([planes, luminance[None]])
        return planes[: self.channels]


def write_photographs(folder: Path) -> None:
    """Write scikit-image's photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        shutil.copyfile(Path(data_dir) / name, folder / name)
