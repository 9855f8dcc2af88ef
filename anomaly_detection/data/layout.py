"""The MVTec AD layout: its files and what they mean.

<root>/<category>/train/good/*                             normal images
<root>/<category>/test/<good or defect type>/*             test images
<root>/<category>/ground_truth/<defect type>/<stem>_mask.* masks; optional per defect type
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anomaly_detection.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
NORMAL = "good"
PHOTOGRAPHS = "data/photographs"  # the built-in auxiliary images
UNKNOWN = 255  # mask value of pixels without ground truth


@dataclass(frozen=True)
class Sample:
    """One image of a category, with its mask if there is one."""

    path: Path
    split: Literal["train", "test"]
    defect_type: str
    mask_path: Path | None = None

    @property
    def label(self) -> int:
        """0 for a normal image, 1 for an anomalous one."""
        return int(self.defect_type != NORMAL)


def available_categories(root: Path) -> list[str]:
    """The sorted names of the folders in `root` that have a `train/good`."""
    return sorted(folder.parent.parent.name for folder in root.glob(f"*/train/{NORMAL}"))


def pictures_in(folder: Path) -> list[Path]:
    """Paths of the images below a folder, by their suffixes, sorted."""
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )


def scan_category(root: Path, category: str) -> tuple[list[Sample], list[str]]:
    """All images of a category, sorted by path, and the faults of its folders.

    Returns:
        The samples, and a line for each finding: what, where, the rule and the fix.

    Raises:
        DataError: The category does not exist.
    """
    folder = root / category
    if not folder.is_dir():
        there = ", ".join(available_categories(root)) or "none"
        raise DataError(
            f"{folder} must be a folder in the MVTec AD layout, but is not there; "
            f"categories in {root}: {there}."
        )
    findings: list[str] = []
    samples = [
        Sample(path, "train", NORMAL) for path in _images(folder / "train" / NORMAL, findings)
    ]
    for other in _folders(folder / "train"):
        if other.name != NORMAL:
            findings.append(f"{other}: training is on normal images only; move it to test.")
    masks: dict[str, dict[str, Path]] = {}
    for truth in _folders(folder / "ground_truth"):
        files = _images(truth, findings)
        of_kind = masks[truth.name] = {}
        for path in files:
            other = of_kind.setdefault(path.stem.removesuffix("_mask"), path)
            if other != path:
                findings.append(f"{path}: a second mask beside {other.name}; remove one.")
    for kind in _folders(folder / "test"):
        of_kind = masks.pop(kind.name, {})
        images = _images(kind, findings)
        samples += [Sample(path, "test", kind.name, of_kind.get(path.stem)) for path in images]
        findings += _mask_findings(kind, images, of_kind)
    for kind_name, of_kind in masks.items():
        findings += _mask_findings(folder / "test" / kind_name, [], of_kind)
    for split in ("train", "test"):
        if not any(sample.split == split for sample in samples):
            where = folder / split / NORMAL
            findings.append(f"{where}: there must be images ({', '.join(SUFFIXES)}), found none.")
    return samples, findings


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and path.name[0] != ".")


def _images(folder: Path, findings: list[str]) -> list[Path]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    images = []
    for path in paths:
        if path.name.startswith(".") or path.name.lower() in SYSTEM_FILES:
            continue
        if path.suffix.lower() in SUFFIXES and path.is_file():
            images.append(path)
        else:
            findings.append(f"{path}: must be one of {', '.join(SUFFIXES)}; convert or remove it.")
    return images


def _mask_findings(kind: Path, images: list[Path], masks: dict[str, Path]) -> list[str]:
    """Masks without an image, and images without a mask where others of their type have one."""
    stems = {path.stem for path in images}
    findings = [
        f"{mask}: mask without its image {kind / stem}.*; add the image or remove the mask."
        for stem, mask in masks.items()
        if stem not in stems
    ]
    if masks and kind.name != NORMAL:
        findings += [
            f"{path}: has no mask, but others of {kind.name!r} do; "
            f"add {path.stem}_mask.png or remove all masks of this type."
            for path in images
            if path.stem not in masks
        ]
    return findings
