"""Which images show the same part, so that they must not be divided."""

import re
from collections.abc import Sequence
from pathlib import Path

from anomaly_detection.data.sample import Sample
from anomaly_detection.errors import DataError

LISTED = 20  # files in an error


def parts_of(
    samples: Sequence[Sample], hashes: Sequence[str], folder: Path, pattern: str | None = None
) -> list[str]:
    """A name for the part that each image shows.

    Images of the same content show the same part, and so do those of the same group: that of the
    sample, or else what a pattern finds in the image's path. Without groups, the names are the
    contents' hashes. Training and test images are named apart, so that what is trained does not
    depend on the test images.

    Args:
        samples: The images.
        hashes: Of their contents.
        folder: What the paths are taken relative to.
        pattern: A regular expression. Its first group names the part, or all that it matches if it
            has no group.

    Raises:
        DataError: It does not match some of the paths.
    """
    names = [sample.group or _match(sample.path, folder, pattern) for sample in samples]
    if pattern and not all(names):
        others = [x.path for x, name in zip(samples, names, strict=True) if not name]
        lines = [
            f"{path}: must match data.group '{pattern}', so that its part is known; rename the "
            "image or change the expression."
            for path in others[:LISTED]
        ]
        more = [f"... and {len(others) - LISTED} more images."] if len(others) > LISTED else []
        raise DataError("\n".join(lines + more))
    joined: dict[tuple[str, str], tuple[str, str]] = {}

    def first(split: str, name: str) -> tuple[str, str]:
        key = split, name
        while joined.setdefault(key, key) != key:
            key = joined[key]
        return key

    for sample, name, content in zip(samples, names, hashes, strict=True):
        if name:
            joined[first(sample.split, content)] = first(sample.split, f"part {name}")
    return [first(x.split, content)[1] for x, content in zip(samples, hashes, strict=True)]


def _match(path: Path, folder: Path, pattern: str | None) -> str:
    found = re.search(pattern, path.relative_to(folder).as_posix()) if pattern else None
    if not found:
        return ""
    return found[1] or "" if found.re.groups else found[0]
