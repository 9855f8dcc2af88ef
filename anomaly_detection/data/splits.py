"""Divide normal images by use (gradients, choice of checkpoint, threshold) or into folds."""

import random
from collections.abc import Iterable, Sequence

from anomaly_detection.data.sample import Sample
from anomaly_detection.errors import DataError


def split_normal_images(
    hashes: Sequence[str],
    validation_fraction: float,
    calibration_fraction: float,
    seed: int,
    test_fraction: float = 0.0,
) -> list[str]:
    """The split of each normal image: `fit`, `validation`, `calibration` or `test`.

    Images with identical content get the same split. Fractions refer to distinct contents.

    Args:
        hashes: Content hashes, in an order that does not depend on the file system.
        validation_fraction: Share that chooses the checkpoint, in (0, 1).
        calibration_fraction: Share that sets the threshold, in (0, 1).
        seed: Random seed of the split.
        test_fraction: Share to test with, in [0, 1); 0 where there are test images already.

    Raises:
        DataError: There are too few images for every split to get one.
    """
    contents = list(dict.fromkeys(hashes))
    counts = split_counts(len(contents), validation_fraction, calibration_fraction, test_fraction)
    random.Random(seed).shuffle(contents)
    names = [name for name, count in counts.items() for _ in range(count)]
    split_of = dict(zip(contents, names, strict=True))
    return [split_of[content] for content in hashes]


def split_counts(
    number: int,
    validation_fraction: float,
    calibration_fraction: float,
    test_fraction: float = 0.0,
) -> dict[str, int]:
    """How many of so many distinct images each split gets.

    Raises:
        DataError: One gets none.
    """
    counts = {
        "validation": round(number * validation_fraction),
        "calibration": round(number * calibration_fraction),
    }
    if test_fraction:
        counts["test"] = round(number * test_fraction)
    counts = {"fit": max(0, number - sum(counts.values()))} | counts
    if min(counts.values()) < 1:
        raise DataError(
            f"each of {_listed(counts)} must get an image, got {_listed(counts.values())} of "
            f"{number} distinct images; add normal images or change "
            f"{_listed(f'data.{name}_fraction' for name in counts if name != 'fit')}."
        )
    return counts


def fraction_to_test(samples: Iterable[Sample], fraction: float) -> float:
    """The share of the normal training images to test with: none if others are there for that."""
    has_normal = any(sample.split == "test" and not sample.label for sample in samples)
    return 0.0 if has_normal else fraction


def draw_folds(hashes: Sequence[str], num_folds: int, seed: int) -> list[int]:
    """The fold of each image, 0 to `num_folds` - 1; the folds differ by at most one content.

    Images with identical content are in the same fold.

    Args:
        hashes: Content hashes, in an order that does not depend on the file system.
        num_folds: At least 2.
        seed: Random seed of the division.

    Raises:
        DataError: There are fewer distinct contents than folds.
    """
    contents = list(dict.fromkeys(hashes))
    if len(contents) < num_folds:
        raise DataError(
            f"evaluation.folds must be at most the number of distinct images, {len(contents)}, "
            f"got {num_folds}; add normal images or take fewer folds."
        )
    random.Random(seed).shuffle(contents)
    fold_of = {content: i % num_folds for i, content in enumerate(contents)}
    return [fold_of[content] for content in hashes]


def _listed(values: Iterable[object]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}"
