"""The simplest layout: <category>/*, a folder of normal images and nothing else."""

from pathlib import Path

from anomaly_detection.data.sample import NORMAL, Sample, is_ignored, is_picture, only_pictures


def is_folder(folder: Path) -> bool:
    """Whether there are images right in the folder; below it, some might show defects."""
    return folder.is_dir() and any(is_picture(x) and not is_ignored(x) for x in folder.iterdir())


def scan(folder: Path) -> tuple[list[Sample], list[str]]:
    """The folder's samples and findings."""
    findings: list[str] = []
    return [Sample(path, "train", NORMAL) for path in only_pictures(folder, findings)], findings
