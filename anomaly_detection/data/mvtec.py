"""Images and masks in the MVTec AD layout, read from their files."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomaly_detection.data.decode import read_pixels
from anomaly_detection.data.format import COLOUR, Format, common_format
from anomaly_detection.data.layouts import scan_category
from anomaly_detection.data.sample import UNKNOWN, Sample
from anomaly_detection.errors import DataError


def read_sample(
    sample: Sample,
    transform: v2.Transform | None = None,
    bit_depth: int = 16,
    format: Format = COLOUR,
) -> dict[str, Any]:
    """Read, decode and transform one sample.

    Returns:
        `image` (C, H, W), integers of the format, or what the transform makes of them; `label` 0
        or 1; `mask` uint8 (1, H, W) with 0 for normal pixels, 1 for anomalous ones, 255 where
        unknown (an anomalous image without a mask);
        `defect_type`; `path`; `sha256` of the image file.

    Raises:
        DataError: As in `read_pixels`, or the format has another number of channels.
    """
    pixels, known, sha256 = read_pixels(sample, bit_depth, format.dtype)
    pixels = format.converted(pixels, sample.path)
    if known is None:
        known = np.full(pixels.shape[:2], UNKNOWN if sample.label else 0, np.uint8)
    planes = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    image = tv_tensors.Image(torch.from_numpy(planes))
    mask = tv_tensors.Mask(torch.from_numpy(known)[None])
    if transform:
        image, mask = transform(image, mask)
    return {
        "image": image.as_subclass(torch.Tensor).expand(format.channels, -1, -1),
        "label": sample.label,
        "mask": mask.as_subclass(torch.Tensor),
        "defect_type": sample.defect_type,
        "path": str(sample.path),
        "sha256": sha256,
    }


class MVTecDataset(Dataset):
    """One split of a category, read from its files, for your own training loop.

    The pipeline instead reads each file once, into arrays (`prepare_category`).

    Args:
        root_dir: Folder of the categories.
        category: Folder in `root_dir`.
        split: `train` (normal images only) or `test`.
        transform: From `get_train_transforms` or `get_test_transforms`; None keeps the size.
        bit_depth: Significant bits of images with more than 8.

    Items are the dicts of `read_sample`, in the format of the training images.

    Raises:
        DataError: The layout has faults; the message lists them all.
    """

    def __init__(
        self,
        root_dir: str | Path,
        category: str,
        split: Literal["train", "test"] = "train",
        transform: v2.Transform | None = None,
        bit_depth: int = 16,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
        _, samples, findings = scan_category(Path(root_dir), category, "mvtec")
        if findings:
            raise DataError("\n".join(findings))
        self.format = common_format([x.path for x in samples if x.split == "train"])
        self.samples = [sample for sample in samples if sample.split == split]
        self.transform = transform
        self.bit_depth = bit_depth

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return read_sample(self.samples[index], self.transform, self.bit_depth, self.format)
