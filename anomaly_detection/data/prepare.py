"""Raw images of a category -> the arrays of `anomaly_detection.data.arrays`."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import joblib
import numpy as np
from tqdm import tqdm

from anomaly_detection.data.arrays import FRAME
from anomaly_detection.data.decode import decode_mask, read_file, read_pixels, resize_mask
from anomaly_detection.data.format import common_format
from anomaly_detection.data.frame import SQUARE, Frame
from anomaly_detection.data.layouts import AUTO, scan_category
from anomaly_detection.data.sample import Sample
from anomaly_detection.data.splits import split_normal_images
from anomaly_detection.errors import DataError

COLUMNS = ("path", "split", "label", "defect_type", "sha256", "mask")


def prepare_category(
    root: Path,
    category: str,
    output: Path,
    *,
    image_size: int,
    bit_depth: int,
    validation_fraction: float,
    calibration_fraction: float,
    seed: int,
    layout: str = AUTO,
    test_fraction: float = 0.15,
    crop: Sequence[int] | None = None,
    resize: str = SQUARE,
    mask: str | None = None,
) -> str:
    """Decode and resize every image of a category, and write arrays and index to `output`.

    Memory is bounded by the images being decoded, one per core. Without a normal test image,
    some normal images are drawn for the test.

    Args:
        root: Folder of the categories.
        category: Folder in `root`.
        output: Where to write.
        image_size: Of the arrays, in pixels.
        bit_depth: Significant bits of images with more than 8.
        validation_fraction: As in `split_normal_images`.
        calibration_fraction: As in `split_normal_images`.
        seed: As in `split_normal_images`.
        layout: Of `LAYOUTS`, or `auto`.
        test_fraction: As in `split_normal_images`, for when there is no normal test image.
        crop: As in `Frame`.
        resize: As in `Frame`.
        mask: An image in the category's folder that is not 0 where pictures are judged.

    Returns:
        The layout's name.

    Raises:
        DataError: The data set has faults. The message lists them all, and nothing is written.
    """
    path = None if mask is None else root / category / mask
    judged = None if path is None else _read_mask(path)
    layout, samples, findings = scan_category(root, category, layout, besides=path)
    frame = Frame(crop, resize, judged, common_format([sample.path for sample in samples]))
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / FRAME).write_text(json.dumps(frame.options), encoding="utf-8")
        hashes = _write_arrays(samples, image_size, bit_depth, frame, partial, findings)
        findings += _in_both_splits(samples, hashes)
        train = [
            sha for sample, sha in zip(samples, hashes, strict=True) if sample.split == "train"
        ]
        if findings:
            raise DataError("\n".join(findings))
        if any(sample.split == "test" and not sample.label for sample in samples):
            test_fraction = 0
        fractions = validation_fraction, calibration_fraction
        try:
            splits = split_normal_images(train, *fractions, seed, test_fraction)
        except DataError as error:
            raise DataError(f"{root / category}: {error}") from None
        splits += ["test"] * (len(samples) - len(train))
        _write_index(samples, splits, hashes, root / category, partial / "index.csv")
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
        return layout
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_mask(path: Path) -> np.ndarray:
    mask = decode_mask(read_file(path), path)
    if not mask.any():
        raise DataError(f"{path}: must be other than 0 somewhere; nothing would be judged.")
    return mask


def _write_arrays(
    samples: list[Sample],
    image_size: int,
    bit_depth: int,
    frame: Frame,
    folder: Path,
    findings: list[str],
) -> list[str]:
    """Write images.npy and masks.npy one image at a time; returns the images' content hashes."""

    def read(sample: Sample) -> tuple[np.ndarray, np.ndarray | None, str] | DataError:
        try:
            image, mask, sha256 = read_pixels(sample, bit_depth, frame.format.dtype)
            seen = frame.resized(image, image_size, sample.path)
        except DataError as error:
            return error
        small = None
        if mask is not None:
            region = frame.region(image)
            left = frame.cut(mask, outside=0)
            if mask.any() and not (left if region is None else left * (region > 0)).any():
                return DataError(
                    f"{sample.path}: its defect must be in the part that is judged, but is not; "
                    "change data.crop, data.resize or data.mask, or remove the image."
                )
            small = resize_mask(left, image_size)
        return seen, small, sha256

    size = (image_size, image_size)
    num_masks = sum(sample.mask_path is not None for sample in samples)
    hashes = []
    items = joblib.Parallel(n_jobs=-1, prefer="threads", return_as="generator")(
        joblib.delayed(read)(sample) for sample in samples
    )
    shape = (len(samples), frame.num_channels, *size)
    with (
        _npy(folder / "images.npy", shape, frame.format.dtype) as images,
        _npy(folder / "masks.npy", (num_masks, *size)) as masks,
    ):
        for item in tqdm(items, total=len(samples), unit="image", desc="prepare", disable=None):
            if isinstance(item, DataError):
                findings.append(str(item))
                hashes.append("")
                continue
            image, mask, sha256 = item
            hashes.append(sha256)
            images.write(np.ascontiguousarray(image).data)
            if mask is not None:
                masks.write(np.ascontiguousarray(mask).data)
    if not num_masks:
        (folder / "masks.npy").unlink()
    return hashes


def _npy(path: Path, shape: tuple[int, ...], dtype: str = "uint8") -> BinaryIO:
    """A new .npy file, positioned after its header.

    Written sequentially, because a memory map's pages would count as memory in use.
    """
    file = path.open("wb")
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file


def _in_both_splits(samples: list[Sample], hashes: list[str]) -> list[str]:
    first: dict[str, Sample] = {}
    findings = []
    for sample, content in zip(samples, hashes, strict=True):
        other = first.setdefault(content, sample)
        if content and other.split != sample.split:
            findings.append(
                f"{sample.path}: must not be in both train and test, but is identical to "
                f"{other.path}; remove one."
            )
    return findings


def _write_index(
    samples: list[Sample], splits: list[str], hashes: list[str], folder: Path, path: Path
) -> None:
    mask_row = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for sample, split, content in zip(samples, splits, hashes, strict=True):
            name = sample.path.relative_to(folder).as_posix()
            mask = mask_row if sample.mask_path else ""
            mask_row += bool(sample.mask_path)
            writer.writerow([name, split, sample.label, sample.defect_type, content, mask])
