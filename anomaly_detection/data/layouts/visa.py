"""VisA's layout (Zou et al., ECCV 2022), with its one-class split.

<category>/Data/Images/Normal/*, <category>/Data/Images/Anomaly/*, <category>/Data/Masks/Anomaly/*
split_csv/1cls.csv beside the categories: object, split, label, image, mask
"""

from pathlib import Path

from anomaly_detection.data.layouts.table import NAME, Row, collect, inside, read_rows
from anomaly_detection.data.sample import ANOMALOUS, NORMAL, Sample, only_pictures
from anomaly_detection.errors import UserError

SPLIT = Path("split_csv/1cls.csv")
COLUMNS = ("object", "split", "label", "image", "mask")


def is_visa(folder: Path) -> bool:
    """Whether a category's folder has VisA's layout."""
    return (folder / "Data" / "Images").is_dir()


def scan(folder: Path) -> tuple[list[Sample], list[str]]:
    """The samples that the split names, and the findings: files and rows that do not match."""
    split = folder.parent / SPLIT
    if not split.is_file():
        return [], [
            f"{split}: must be there; VisA's own table says which images are for training and "
            "which for the test."
        ]
    try:
        rows = [(n, row) for n, row in read_rows(split, COLUMNS) if row["object"] == folder.name]
    except ValueError as error:
        return [], [f"{split}: {error}"]
    samples, findings = collect(split, rows, lambda row: _sample(folder, row))
    if rows:
        named = {folder.parent / row["image"] for _, row in rows}
        for kind in ("Normal", "Anomaly"):
            for path in only_pictures(folder / "Data" / "Images" / kind, findings):
                if path not in named:
                    findings.append(f"{path}: must be in {split}; add a row or remove the image.")
    return samples, findings


def place(folder: Path, kind: str) -> Path:
    """Refuse: the split is VisA's own, beside the categories, where DVC does not watch it.

    Raises:
        UserError: Always.
    """
    raise UserError(
        f"{folder} must have another layout to take images, got VisA's, whose split is fixed; list "
        f"its images in {folder / NAME} (see docs/data.md), which then counts instead."
    )


def _sample(folder: Path, row: Row) -> Sample:
    """The sample of a row.

    Raises:
        ValueError: A cell breaks a rule, which the message gives.
    """
    if row["label"] not in ("normal", "anomaly"):
        raise ValueError(f"label must be normal or anomaly, got {row['label']!r}.")
    if row["split"] not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {row['split']!r}.")
    is_normal, is_train = row["label"] == "normal", row["split"] == "train"
    if is_train and not is_normal:
        raise ValueError("training is on normal images only; let split be test.")
    mask = inside(folder, row["mask"], folder.parent) if row["mask"] else None
    path = inside(folder, row["image"], folder.parent)
    kind = NORMAL if is_normal else ANOMALOUS
    return Sample(path, "train" if is_train else "test", kind, mask)
