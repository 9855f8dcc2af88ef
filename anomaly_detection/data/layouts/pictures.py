"""The simplest layout: <category>/*, a folder of normal images and nothing else."""

from pathlib import Path

from anomaly_detection.data.sample import NORMAL, Sample, is_ignored, is_picture, only_pictures


def is_folder(folder: Path) -> bool:
    """Whether there are images right in the folder; below it, some might show defects."""
    return folder.is_dir() and any(is_picture(x) and not is_ignored(x) for x in folder.iterdir())


def place(folder: Path, kind: str) -> Path:
    """The folder itself, for a normal image.

    Raises:
        ValueError: It is another one.
    """
    if kind != NORMAL:
        raise ValueError(
            f"{folder} must have MVTec AD's layout to take defects, but has normal images and "
            f"nothing else; move these to {folder / 'train' / 'good'}."
        )
    return folder


def scan(folder: Path) -> tuple[list[Sample], list[str]]:
    """The folder's samples and findings."""
    findings: list[str] = []
    return [Sample(path, "train", NORMAL) for path in only_pictures(folder, findings)], findings
