"""VisA's layout (Zou et al., ECCV 2022), with its one-class split.

<category>/Data/Images/Normal/*, <category>/Data/Images/Anomaly/*, <category>/Data/Masks/Anomaly/*
split_csv/1cls.csv beside the categories: object, split, label, image, mask
"""

import csv
from pathlib import Path

from anomaly_detection.data.sample import ANOMALOUS, NORMAL, Sample, pictures_in

SPLIT = Path("split_csv/1cls.csv")


def is_visa(folder: Path) -> bool:
    """Whether a category's folder has VisA's layout."""
    return (folder / "Data" / "Images").is_dir()


def scan(folder: Path) -> tuple[list[Sample], list[str]]:
    """The samples that the split names, and the findings: files and rows that do not match."""
    root, split = folder.parent, folder.parent / SPLIT
    if not split.is_file():
        return [], [f"{split}: must be there, VisA's own file; it divides its images."]
    with split.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("object") == folder.name]
    findings, samples = [], []
    for row in rows:
        path, mask = root / row["image"], root / row["mask"] if row["mask"] else None
        kind = NORMAL if row["label"] == "normal" else ANOMALOUS
        samples.append(Sample(path, "train" if row["split"] == "train" else "test", kind, mask))
        for file_path in filter(None, (path, mask)):
            if not file_path.is_file():
                findings.append(f"{file_path}: must be there, since {split} names it.")
    listed = {sample.path for sample in samples}
    for path in pictures_in(folder / "Data" / "Images"):
        if path not in listed:
            findings.append(f"{path}: must be in {split}; add a row or remove the image.")
    return sorted(samples, key=lambda x: (x.split != "train", x.path)), findings
