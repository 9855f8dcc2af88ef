"""A table of images: <category>/samples.csv, with paths relative to it.

Columns: path and label (normal, anomalous; or 0, 1); optional are split (train, test), defect_type
and mask (a path). Without a split, normal images are for training and the others for the test.
Separators are commas, semicolons or tabs.
"""

import csv
from pathlib import Path
from typing import Literal

from anomaly_detection.data.sample import ANOMALOUS, NORMAL, SUFFIXES, Sample
from anomaly_detection.errors import one_line

NAME = "samples.csv"
COLUMNS = ("path", "label", "split", "defect_type", "mask")
LABELS = {"0": 0, "1": 1, "normal": 0, "anomalous": 1}


def is_table(folder: Path) -> bool:
    """Whether a category's folder has the table."""
    return (folder / NAME).is_file()


def scan(folder: Path) -> tuple[list[Sample], list[str]]:
    """The table's samples, training before test, and the findings by row."""
    table = folder / NAME
    try:
        rows = _rows(table)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        return [], [f"{table}: must be a table in UTF-8 ({one_line(error)})."]
    samples: dict[Path, Sample] = {}
    findings = []
    for number, row in enumerate(rows, 2):
        where = f"{table}, row {number}"
        try:
            sample = _sample(folder, row)
        except ValueError as error:
            findings.append(f"{where}: {error}")
            continue
        if sample.path in samples:
            findings.append(f"{where}: names {row['path']} for a second time; remove one row.")
        samples[sample.path] = sample
    return sorted(samples.values(), key=lambda x: (x.split != "train", x.path)), findings


def _rows(table: Path) -> list[dict[str, str]]:
    text = table.read_text(encoding="utf-8-sig")
    heads = text.splitlines()[0] if text else ""
    separator = next((x for x in (";", "\t") if x in heads), ",")
    reader = csv.DictReader(text.splitlines(), delimiter=separator, restval="", strict=True)
    names = reader.fieldnames or []
    if {"path", "label"} - set(names) or set(names) - set(COLUMNS):
        raise ValueError(
            f"columns must be path and label, and may be {', '.join(COLUMNS[2:])}; "
            f"got {', '.join(names) or 'none'}"
        )
    rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    return [dict.fromkeys(COLUMNS, "") | row for row in rows]


def _sample(folder: Path, row: dict[str, str]) -> Sample:
    """The sample of a row.

    Raises:
        ValueError: A cell breaks a rule, which the message gives.
    """
    if row["label"] not in LABELS:
        raise ValueError(f"label must be one of {', '.join(LABELS)}, got {row['label']!r}.")
    label = LABELS[row["label"]]
    kind = row["defect_type"] or (ANOMALOUS if label else NORMAL)
    if (kind != NORMAL) != bool(label):
        raise ValueError(
            f"defect_type must be empty or {NORMAL} for normal images and neither for others, "
            f"got {kind!r} with label {row['label']!r}."
        )
    split: Literal["train", "test"] = "test" if label else "train"
    if row["split"] not in ("", "train", "test"):
        raise ValueError(f"split must be train, test or empty, got {row['split']!r}.")
    if row["split"] == "test":
        split = "test"
    elif row["split"] == "train" and label:
        raise ValueError("training is on normal images only; let split be test.")
    if row["mask"] and not label:
        raise ValueError("a normal image has no mask; leave the cell empty.")
    mask = _inside(folder, row["mask"]) if row["mask"] else None
    return Sample(_inside(folder, row["path"]), split, kind, mask)


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"paths must lead to files in {folder}, got {name!r}.")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"images and masks must be one of {', '.join(SUFFIXES)}, got {name!r}.")
    if not path.is_file():
        raise ValueError(f"{name!r} must be a file in {folder}, but is not there.")
    return path
