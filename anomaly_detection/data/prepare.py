"""Raw images of a category -> the arrays of `anomaly_detection.data.arrays`."""

import csv
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from anomaly_detection.data.arrays import (
    FRAME,
    IMAGES,
    INDEX,
    MASKS,
    OVERVIEWS,
    TEST,
    TILES,
    TRAIN,
    folder_of,
)
from anomaly_detection.data.calibration import SPLIT, require_calibration_images
from anomaly_detection.data.decode import content_hash, decode_mask, read_file, read_pixels
from anomaly_detection.data.format import common_format
from anomaly_detection.data.frame import EACH, SQUARE, Frame
from anomaly_detection.data.groups import parts_of
from anomaly_detection.data.layouts import AUTO, scan_category
from anomaly_detection.data.overview import overview
from anomaly_detection.data.sample import Sample, picture_named
from anomaly_detection.data.splits import fraction_to_test, split_normal_images
from anomaly_detection.data.threads import in_threads
from anomaly_detection.errors import DataError
from anomaly_detection.progress import progress

COLUMNS = ("path", "split", "label", "defect_type", "sha256", "part", "height", "width", "mask")


class Read(NamedTuple):
    """What is written of an image.

    Attributes:
        size: Height and width of what is seen, in pixels.
        tiles: By number, each as in images.npy.
        masks: Likewise, uint8 (S, S), if it has a mask.
        overview: uint8 (3, s, s), if it is tiled.
    """

    size: tuple[int, int]
    tiles: dict[int, np.ndarray]
    masks: list[np.ndarray]
    overview: np.ndarray | None


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
    tile_size: int | None = None,
    tile_overlap: int = 0,
    false_reject_rate: float | None = None,
    calibration: str = SPLIT,
    group: str | None = None,
) -> str:
    """Decode and resize every image of a category, and write arrays and index to `output`.

    Memory is bounded by the images being decoded, two per core. Without a normal test image,
    some normal images are drawn for the test. What is written to `train`, the format of the images
    included, does not depend on those that the data set has for the test.

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
        mask: In the category's folder, an image that is not 0 where pictures are judged, or a
            folder with one for each picture.
        tile_size: As in `Frame`.
        tile_overlap: As in `Frame`.
        false_reject_rate: What the threshold is to promise; with too few images for that, nothing
            is decoded. None for no promise.
        calibration: As `method` in `require_calibration_images`.
        group: As `pattern` in `parts_of`: images of one part are in one split.

    Returns:
        The layout's name.

    Raises:
        DataError: The data set has faults. The message lists them all, and nothing is written.
    """
    path = None if mask is None else root / category / mask
    judged = None if path is None else EACH if path.is_dir() else _read_mask(path)
    layout, samples, findings = scan_category(root, category, layout, besides=path)
    format = common_format([sample.path for sample in samples if sample.split == "train"])
    frame = Frame(crop, resize, judged, tile_size, tile_overlap, format)
    hashes = list(in_threads(_hash, [sample.path for sample in samples]))
    findings += _in_both_splits(samples, hashes)
    try:
        parts = parts_of(samples, hashes, root / category, group)
    except DataError as error:
        raise DataError("\n".join([*findings, str(error)])) from None
    train = [part for sample, part in zip(samples, parts, strict=True) if sample.split == "train"]
    test_fraction = fraction_to_test(samples, test_fraction)
    fractions = validation_fraction, calibration_fraction
    try:
        splits = split_normal_images(train, *fractions, seed, test_fraction)
        if false_reject_rate is not None:
            require_calibration_images(
                len(set(train)),
                *fractions,
                test_fraction,
                rate=false_reject_rate,
                method=calibration,
                unit="images" if set(train) <= set(hashes) else "parts",
            )
    except DataError as error:
        raise DataError("\n".join(findings) or f"{root / category}: {error}") from None
    splits += ["test"] * (len(samples) - len(train))
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        images = _read_all(samples, root / category, path, image_size, bit_depth, frame)
        sizes = {}
        with ExitStack() as stack:
            folders = {x: stack.enter_context(_Folder(partial / x)) for x in (TRAIN, TEST)}
            shown = progress(images, "prepare", "images", len(samples))
            for sample, split, sha256, part, image in zip(
                samples, splits, hashes, parts, shown, strict=True
            ):
                if isinstance(image, DataError):
                    findings.append(str(image))
                    continue
                sizes[sample.path] = image.size
                name = sample.path.relative_to(root / category).as_posix()
                known = {"path": name, "split": split, "label": sample.label}
                known |= {"defect_type": sample.defect_type, "sha256": sha256, "part": part}
                folders[folder_of(split)].write(known, image)
        if findings:
            raise DataError("\n".join(findings))
        for folder in folders:
            (partial / folder / FRAME).write_text(json.dumps(frame.options), encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
        return layout
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _hash(path: Path) -> str:
    """The hash of a file's content, empty if it cannot be read; reading its pixels says why."""
    try:
        return content_hash(read_file(path))
    except DataError:
        return ""


def _read_mask(path: Path) -> np.ndarray:
    mask = decode_mask(read_file(path), path)
    if not mask.any():
        raise DataError(f"{path}: must be other than 0 somewhere; nothing would be judged.")
    return mask


def _read_all(
    samples: list[Sample],
    folder: Path,
    masks: Path | None,
    image_size: int,
    bit_depth: int,
    frame: Frame,
) -> Iterator[Read | DataError]:
    """Each sample as it is to be written, or what is wrong with it; `masks` may be a folder."""
    paired = _pair(samples, folder, masks) if frame.mask is EACH and masks else {}

    def read(sample: Sample) -> Read | DataError:
        try:
            image, mask, _ = read_pixels(sample, bit_depth, frame.format.dtype)
            own = frame
            if judged := paired.get(sample.path):
                if isinstance(judged, DataError):
                    return judged
                own = frame.with_mask(_read_mask(judged))
            tiles = dict(own.tiles(image, image_size, sample.path))
            of_tiles = [] if mask is None else own.cut_mask(mask, image_size, list(tiles))
        except DataError as error:
            return error
        seen = own.cut(image)
        if mask is not None and mask.any() and not _is_judged(own, image, mask):
            return DataError(
                f"{sample.path}: its defect must be in the part that is judged, but is not; "
                "change data.crop, data.resize or data.mask, or remove the image."
            )
        small = overview(seen) if frame.tile_size else None
        return Read((seen.shape[0], seen.shape[1]), tiles, of_tiles, small)

    return in_threads(read, samples)


def _pair(samples: list[Sample], folder: Path, masks: Path) -> dict[Path, Path | DataError]:
    """The mask of each image, by its path, or what is wrong with it."""
    paired: dict[Path, Path | DataError] = {}
    first: dict[Path, Path] = {}
    for path in (sample.path for sample in samples):
        try:
            mask = picture_named(path.relative_to(folder), masks)
        except DataError as error:
            paired[path] = DataError(f"{folder}: {error}")
            continue
        paired[path] = mask
        if (other := first.setdefault(mask, path)) != path:
            paired[path] = DataError(
                f"{path}: must have a mask of its own, but {mask} is that of {other}; keep masks "
                "in folders like the images'."
            )
    return paired


def _is_judged(frame: Frame, image: np.ndarray, mask: np.ndarray) -> bool:
    """Whether any of a defect is in the part of an image that is judged."""
    left, region = frame.cut(mask, outside=0), frame.region(image)
    return bool((left if region is None else left * (region > 0)).any())


class _Folder:
    """The arrays and the index of one folder, which grow by an image at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.tiles, self.masks, self.overviews = (
            _Array(path / name) for name in (IMAGES, MASKS, OVERVIEWS)
        )
        self.rows: list[dict[str, Any]] = []
        self.numbers: list[tuple[int, int]] = []

    def write(self, known: dict[str, Any], image: Read) -> None:
        """Append an image, of which the index has what is known besides."""
        (height, width), mask = image.size, self.masks.count if image.masks else ""
        self.numbers += [(len(self.rows), number) for number in image.tiles]
        self.rows.append({**known, "height": height, "width": width, "mask": mask})
        self.tiles.write(image.tiles.values())
        self.masks.write(image.masks)
        self.overviews.write([] if image.overview is None else [image.overview])

    def __enter__(self) -> "_Folder":
        return self

    def __exit__(self, *error: Any) -> None:
        for array in (self.tiles, self.masks, self.overviews):
            array.close()
        np.save(self.path / TILES, np.array(self.numbers, dtype=np.int32).reshape(-1, 2))
        with (self.path / INDEX).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


class _Array:
    """A .npy file that grows by items of one kind; there is none if nothing is written.

    Written sequentially, because a memory map's pages would count as memory in use.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.file: BinaryIO | None = None
        self.like = np.empty(0)

    def write(self, items: Iterable[np.ndarray]) -> None:
        """Append items."""
        for item in items:
            if self.file is None:
                self.file, self.like = self.path.open("wb"), item
                self._write_header(self.file)
            self.file.write(np.ascontiguousarray(item).data)
            self.count += 1

    def _write_header(self, file: BinaryIO) -> None:
        descr = np.lib.format.dtype_to_descr(self.like.dtype)
        shape = (self.count, *self.like.shape)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

    def close(self) -> None:
        """Write how many there are."""
        if self.file:
            self.file.seek(0)
            self._write_header(self.file)  # of the same length: NumPy leaves room for the count
            self.file.close()


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
