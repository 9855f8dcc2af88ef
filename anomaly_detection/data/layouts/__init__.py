"""The layouts that data sets have on disk, and which one a folder has."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from anomaly_detection.data.layouts import folders, pictures, table, visa
from anomaly_detection.data.sample import Sample, is_ignored
from anomaly_detection.errors import DataError

AUTO = "auto"
Scan = tuple[list[Sample], list[str]]


class Layout(NamedTuple):
    """A way to keep a category's images.

    Attributes:
        what: What its folder has, in words.
        is_in: Whether a category's folder has it.
        scan: All images of a category's folder, sorted by path, and the faults of its files: a line
            for each, with what, where, the rule and the fix.
        place: The folder for a further image of a category: to train with, if its kind is `NORMAL`,
            else to test with; a ValueError if it cannot be taken, a UserError if none can.
    """

    what: str
    is_in: Callable[[Path], bool]
    scan: Callable[[Path], Scan]
    place: Callable[[Path, str], Path]


LAYOUTS = {  # in the order in which `auto` tries them
    "csv": Layout(table.NAME, table.is_table, table.scan, table.place),
    "mvtec": Layout("train/good", folders.is_mvtec, folders.scan_mvtec, folders.place_mvtec),
    "btad": Layout("train/ok", folders.is_btad, folders.scan_btad, folders.place_btad),
    "visa": Layout("Data/Images", visa.is_visa, visa.scan, visa.place),
    "folder": Layout("images directly inside", pictures.is_folder, pictures.scan, pictures.place),
}


def layout_of(folder: Path, layout: str = AUTO) -> str | None:
    """The layout of a category's folder, if it is this one or may be any; else None."""
    try:
        return next((name for name in _names(layout) if LAYOUTS[name].is_in(folder)), None)
    except PermissionError:  # a disk's lost+found, for instance
        return None


def available_categories(root: Path, layout: str = AUTO) -> list[str]:
    """The sorted names of the folders in `root` that have a layout."""
    return sorted(
        folder.name for folder in root.iterdir() if folder.is_dir() and layout_of(folder, layout)
    )


def required(layout: str = AUTO) -> str:
    """What a category's folder must have for this layout, or for any, in words."""
    return ", or ".join(f"{LAYOUTS[name].what} ({name})" for name in _names(layout))


def without_layout(folder: Path, layout: str = AUTO) -> str:
    """What to say of a category's folder that is there, but has not this layout, or any."""
    there = sorted(path.name for path in folder.iterdir() if not is_ignored(path))
    listed = ", ".join(there[:5] + ["..."] * (len(there) > 5)) or "nothing"
    return f"{folder} must have images to train with: {required(layout)}; got {listed}."


def scan_category(
    root: Path, category: str, layout: str = AUTO, besides: Path | None = None
) -> tuple[str, list[Sample], list[str]]:
    """All images of a category, sorted by path, and the faults of its files.

    Args:
        root: Folder of the categories.
        category: Folder in `root`.
        layout: Of `LAYOUTS`, or `auto`.
        besides: A file that is no image of the category, or a folder of such files.

    Returns:
        The layout's name, the samples, and a line for each finding: what, where, the rule, the fix.

    Raises:
        DataError: The category does not exist in this layout.
    """
    folder = root / category
    name = layout_of(folder, layout)
    if name is None and folder.is_dir():
        raise DataError(without_layout(folder, layout))
    if name is None:
        there = ", ".join(available_categories(root, layout)) if root.is_dir() else ""
        raise DataError(
            f"{folder} must be a folder with {required(layout)}; categories in {root}: "
            f"{there or 'none'}."
        )
    samples, findings = LAYOUTS[name].scan(folder)
    if besides:
        samples = [sample for sample in samples if not sample.path.is_relative_to(besides)]
    return name, samples, [line for line in findings if not line.startswith(f"{besides}: ")]


def _names(layout: str) -> list[str]:
    return list(LAYOUTS) if layout == AUTO else [layout]
