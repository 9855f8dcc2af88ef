"""Images and masks in the MVTec AD layout, read from their files."""

import hashlib
import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomaly_detection.data.layout import UNKNOWN, Sample, scan_category
from anomaly_detection.errors import DataError


def read_sample(
    sample: Sample, transform: v2.Transform | None = None, bit_depth: int = 16
) -> dict[str, Any]:
    """Read, decode and transform one sample.

    Returns:
        `image` uint8 (3, H, W); `label` 0 or 1; `mask` uint8 (1, H, W) with 0 for normal pixels,
        1 for anomalous ones, 255 where it is not known (an anomalous image without a mask);
        `defect_type`; `path`; `sha256` of the image file.

    Raises:
        DataError: A file is unreadable or truncated, has values beyond `bit_depth` bits, or the
            mask's size is not the image's.
    """
    content = _read(sample.path)
    image = _decode_image(content, sample.path, bit_depth)
    mask = torch.full((1, *image.shape[1:]), UNKNOWN if sample.label else 0, dtype=torch.uint8)
    if sample.mask_path:
        mask = _decode_mask(sample.mask_path)
    if mask.shape[1:] != image.shape[1:]:
        raise DataError(
            f"{sample.mask_path}: a mask must be as large as its image, got "
            f"{_size(mask)} pixels for {sample.path.name} of {_size(image)}."
        )
    image, mask = tv_tensors.Image(image), tv_tensors.Mask(mask)
    if transform:
        image, mask = transform(image, mask)
    return {
        "image": image.as_subclass(torch.Tensor).expand(3, -1, -1),
        "label": sample.label,
        "mask": mask.as_subclass(torch.Tensor),
        "defect_type": sample.defect_type,
        "path": str(sample.path),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: must be readable: {error.strerror}.") from None


def _open(content: bytes, path: Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not of a known format" if unknown else str(error)
        raise DataError(
            f"{path}: must be a whole image, but cannot be decoded ({reason}); "
            "replace or remove it."
        ) from None


def _decode_image(content: bytes, path: Path, bit_depth: int) -> torch.Tensor:
    """uint8 (1, H, W) for a grey image, (3, H, W) for a coloured one."""
    image = _open(content, path)
    if image.mode == "F":
        raise DataError(f"{path}: must have 8 or 16 bits, got floating point; convert it.")
    if image.mode.startswith("I"):
        values, limit = np.asarray(image), 2**bit_depth - 1
        if values.min() < 0:
            raise DataError(f"{path}: values must not be negative, got {values.min()}; convert it.")
        if values.max() > limit:
            raise DataError(
                f"{path}: values must be at most {limit} with data.bit_depth {bit_depth}, "
                f"got {values.max()}; raise data.bit_depth."
            )
        values = np.rint(values * (255 / limit)).astype(np.uint8)
    elif bit_depth < 16 and _has_16_bit_channels(content, image):
        raise DataError(
            f"{path}: colour of 16 bits must use all of them, since only the upper 8 are read; "
            f"data.bit_depth {bit_depth} is for grey images. Convert it to 8 bits."
        )
    else:
        grey = image.mode in ("1", "L", "LA")
        values = np.array(image.convert("L" if grey else "RGB"))
    tensor = torch.from_numpy(values)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def _has_16_bit_channels(content: bytes, image: Image.Image) -> bool:
    """Whether Pillow has cut 16 bits to 8, which it does with all but plain grey."""
    if content.startswith(b"\x89PNG"):
        return content[24] == 16  # the bit depth in the header
    return max(getattr(image, "tag_v2", {}).get(258, (8,))) > 8  # TIFF's BitsPerSample


def _decode_mask(path: Path) -> torch.Tensor:
    """uint8 (1, H, W): 1 wherever the mask has any value but 0."""
    mask = _open(_read(path), path)
    values = np.asarray(mask.convert("RGB") if mask.mode in ("P", "CMYK") else mask)
    if mask.mode in ("LA", "RGBA"):
        values = values[..., :-1]
    anomalous = values.any(axis=2) if values.ndim == 3 else values != 0
    return torch.from_numpy(anomalous.astype(np.uint8))[None]


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[2]} x {image.shape[1]}"


class MVTecDataset(Dataset):
    """The images of one split of a category, read from their files.

    Args:
        root: Folder of the categories.
        category: Folder in `root`.
        split: `train` (normal images only) or `test`.
        transform: From `get_train_transforms` or `get_test_transforms`; None keeps the size.
        bit_depth: Significant bits of images that have more than 8.

    Items are the dicts of `read_sample`.

    Raises:
        DataError: The layout has faults; the message lists all of them.
    """

    def __init__(
        self,
        root: str | Path,
        category: str,
        split: Literal["train", "test"] = "train",
        transform: v2.Transform | None = None,
        bit_depth: int = 16,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
        samples, findings = scan_category(Path(root), category)
        if findings:
            raise DataError("\n".join(findings))
        self.samples = [sample for sample in samples if sample.split == split]
        self.transform = transform
        self.bit_depth = bit_depth

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return read_sample(self.samples[index], self.transform, self.bit_depth)
