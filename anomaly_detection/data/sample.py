"""An image of a category, and which files are images."""

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from anomaly_detection.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
NORMAL = "good"
ANOMALOUS = "defective"  # where a data set does not name its defects
UNKNOWN = 255  # mask value of pixels without ground truth


@dataclass(frozen=True)
class Sample:
    """One image of a category, with its mask if there is one."""

    path: Path
    split: Literal["train", "test"]
    defect_type: str
    mask_path: Path | None = None
    group: str = ""  # names the part, if the layout does

    @property
    def label(self) -> int:
        """0 for a normal image, 1 for an anomalous one."""
        return int(self.defect_type != NORMAL)


def is_picture(path: Path) -> bool:
    """Whether a path leads to an image file, by its suffix."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def is_ignored(path: Path) -> bool:
    """Whether a path is hidden, or a file that operating systems leave behind."""
    return path.name.startswith(".") or path.name.lower() in SYSTEM_FILES


def picture_named(path: PurePath, folder: Path) -> Path:
    """The image in a folder that has a path's name, with any suffix.

    It may be below the folder as the path is below others: of `line/good/1.png`, `line/good/1.*` is
    looked for first, then `good/1.*`, then `1.*`.

    Raises:
        DataError: There is none.
    """
    parts = path.with_suffix("").parts[len(path.anchor) > 0 :]
    above = max((i + 1 for i, part in enumerate(parts) if part == ".."), default=0)
    for start in range(above, len(parts)):
        base = folder.joinpath(*parts[start:])
        for suffix in SUFFIXES:
            for name in (base.name + suffix, base.name + suffix.upper()):
                if (found := base.with_name(name)).is_file():
                    return found
    raise DataError(f"{path}: must have a mask, such as {folder / parts[-1]}{SUFFIXES[0]}.")


def pictures_in(folder: Path) -> list[Path]:
    """Paths of the images below a folder, sorted."""
    return sorted(filter(is_picture, folder.rglob("*")))


def only_pictures(folder: Path, findings: list[str]) -> list[Path]:
    """Paths of the images right in a folder, sorted; every other file is a finding."""
    pictures = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_ignored(path):
            continue
        if is_picture(path):
            pictures.append(path)
        elif path.is_dir():
            findings.append(f"{path}: there must be no folder here; move or remove it.")
        else:
            findings.append(f"{path}: must be one of {', '.join(SUFFIXES)}; convert or remove it.")
    return pictures
