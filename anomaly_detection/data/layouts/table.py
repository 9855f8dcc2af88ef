"""A table of images: <category>/samples.csv, with paths relative to it.

Columns: path and label (normal, anomalous; or 0, 1); optional are split (train, test), defect_type,
mask (a path) and group (a name that pictures of one part share). Without a split, normal images are
for training and the others for the test.
Separators are commas, semicolons or tabs.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from anomaly_detection.data.sample import ANOMALOUS, NORMAL, SUFFIXES, Sample
from anomaly_detection.files import replacing

NAME = "samples.csv"
REQUIRED, OPTIONAL = ("path", "label"), ("split", "defect_type", "mask", "group")
LABELS = {"0": 0, "1": 1, "normal": 0, "anomalous": 1}

Row = dict[str, str]


def is_table(folder: Path) -> bool:
    """Whether a category's folder has the table."""
    return (folder / NAME).is_file()


def scan(folder: Path) -> tuple[list[Sample], list[str]]:
    """The table's samples, training before test, and the findings by line."""
    table = folder / NAME
    try:
        rows = list(read_rows(table, REQUIRED, OPTIONAL))
    except ValueError as error:
        return [], [f"{table}: {error}"]
    return collect(table, rows, lambda row: _sample(folder, row))


def place(folder: Path, kind: str) -> Path:
    """The folder of the table.

    Raises:
        ValueError: The table has no column for the defect type.
    """
    table = folder / NAME
    if kind not in (NORMAL, *LABELS) and "defect_type" not in _header(_text(table))[0]:
        raise ValueError(f"{table} must have a column defect_type to take {kind!r}; add it.")
    return folder


def append(folder: Path, rows: Iterable[Row]) -> None:
    """Add rows at the table's end, in its columns; what is there stays as it is."""
    table = folder / NAME
    text = table.read_bytes().decode("utf-8")
    names, separator = _header(text.removeprefix("\ufeff"))
    end = "\r\n" if "\r\n" in text else "\n"
    added = io.StringIO(newline="")
    writer = csv.DictWriter(
        added, names, delimiter=separator, lineterminator=end, extrasaction="ignore"
    )
    writer.writerows(rows)
    with replacing(table) as partial:
        partial.write_bytes((text.rstrip("\r\n") + end + added.getvalue()).encode("utf-8"))


def read_rows(
    table: Path,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    others: bool = False,
) -> Iterator[tuple[int, Row]]:
    """Each row of a table with the number of its line; an absent optional cell is empty.

    With `others`, there may be further columns.

    Raises:
        ValueError: It is no such table.
    """
    text = _text(table)
    names, separator = _header(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    next(reader, None)
    may_be = f", and may be {', '.join(optional)}" if optional else ""
    if set(required) - set(names) or (set(names) - {*required, *optional} and not others):
        raise ValueError(
            f"columns must be {', '.join(required)}{may_be}, got {', '.join(names) or 'none'}."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"columns must differ, got {', '.join(names)}.")
    for cells in filter(None, reader):
        if len(cells) > len(names):
            raise ValueError(
                f"line {reader.line_num}: must have {len(names)} cells at most, got {len(cells)}."
            )
        row = dict.fromkeys((*required, *optional), "")
        yield reader.line_num, row | dict(zip(names, (x.strip() for x in cells), strict=False))


def collect(
    table: Path, rows: list[tuple[int, Row]], sample_of: Callable[[Row], Sample]
) -> tuple[list[Sample], list[str]]:
    """The samples of rows, training before test and sorted by path, and the rows' faults."""
    samples: dict[Path, Sample] = {}
    findings = [] if rows else [f"{table}: must name images, but has no rows for them."]
    for line, row in rows:
        try:
            sample = sample_of(row)
            if sample.path in samples:
                raise ValueError(f"names {sample.path.name} for a second time; remove one row.")
            samples[sample.path] = sample
        except ValueError as error:
            findings.append(f"{table}, line {line}: {error}")
    return sorted(samples.values(), key=lambda x: (x.split != "train", x.path)), findings


def inside(folder: Path, name: str, start: Path) -> Path:
    """The path of an image in a folder.

    Args:
        folder: Where it must be.
        name: The path in the table.
        start: What that is relative to.

    Raises:
        ValueError: It is elsewhere, not there, or not an image.
    """
    path = start / name
    if ".." in path.parts or not path.is_relative_to(folder):
        raise ValueError(f"paths must lead to files in {folder}, got {name!r}.")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"images and masks must be one of {', '.join(SUFFIXES)}, got {name!r}.")
    if not path.is_file():
        raise ValueError(f"{name!r} must be a file, but is not there.")
    return path


def _text(table: Path) -> str:
    try:
        return table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("must be encoded in UTF-8; save it again as that.") from None


def _header(text: str) -> tuple[list[str], str]:
    """The names of a table's columns, and what separates them."""
    heads = text.split("\n", 1)[0]
    separator = next((x for x in (";", "\t") if x in heads), ",")
    cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])
    return [cell.strip() for cell in cells], separator


def kind_of(row: Row, unnamed: str = ANOMALOUS) -> str:
    """What a row's label and defect_type say: NORMAL, or the defect type.

    Raises:
        ValueError: They break a rule, which the message gives.
    """
    if row["label"] not in LABELS:
        raise ValueError(f"label must be one of {', '.join(LABELS)}, got {row['label']!r}.")
    label = LABELS[row["label"]]
    kind = row["defect_type"] or (unnamed if label else NORMAL)
    if (kind != NORMAL) != bool(label):
        raise ValueError(
            f"defect_type must be empty or {NORMAL} for normal images and neither for others, "
            f"got {kind!r} with label {row['label']!r}."
        )
    return kind


def _sample(folder: Path, row: Row) -> Sample:
    """The sample of a row.

    Raises:
        ValueError: A cell breaks a rule, which the message gives.
    """
    kind = kind_of(row)
    label = kind != NORMAL
    if row["split"] not in ("", "train", "test"):
        raise ValueError(f"split must be train, test or empty, got {row['split']!r}.")
    if label and row["split"] == "train":
        raise ValueError("training is on normal images only; let split be test.")
    if row["mask"] and not label:
        raise ValueError("a normal image has no mask; leave the cell empty.")
    mask = inside(folder, row["mask"], folder) if row["mask"] else None
    is_test = label or row["split"] == "test"
    path = inside(folder, row["path"], folder)
    return Sample(path, "test" if is_test else "train", kind, mask, row["group"])
