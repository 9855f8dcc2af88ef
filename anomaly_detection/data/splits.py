"""Divide normal images by use (gradients, choice of checkpoint, threshold) or into folds."""

import random
from collections.abc import Iterable, Sequence

from anomaly_detection.data.sample import Sample
from anomaly_detection.errors import DataError


def split_normal_images(
    parts: Sequence[str],
    validation_fraction: float,
    calibration_fraction: float,
    seed: int,
    test_fraction: float = 0.0,
) -> list[str]:
    """The split of each normal image: `fit`, `validation`, `calibration` or `test`.

    Images of one part get the same split. Fractions refer to parts.

    Args:
        parts: The part that each image shows, as by `parts_of`: its content's hash if it is the
            only picture of it. In an order that does not depend on the file system.
        validation_fraction: Share that chooses the checkpoint, in (0, 1).
        calibration_fraction: Share that sets the threshold, in (0, 1).
        seed: Random seed of the split.
        test_fraction: Share to test with, in [0, 1); 0 where there are test images already.

    Raises:
        DataError: There are too few images for every split to get one.
    """
    distinct = list(dict.fromkeys(parts))
    counts = split_counts(len(distinct), validation_fraction, calibration_fraction, test_fraction)
    random.Random(seed).shuffle(distinct)
    names = [name for name, count in counts.items() for _ in range(count)]
    split_of = dict(zip(distinct, names, strict=True))
    return [split_of[part] for part in parts]


def split_counts(
    number: int,
    validation_fraction: float,
    calibration_fraction: float,
    test_fraction: float = 0.0,
) -> dict[str, int]:
    """How many of so many distinct images each split gets, or of so many parts.

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


def draw_folds(parts: Sequence[str], num_folds: int, seed: int) -> list[int]:
    """The fold of each image, 0 to `num_folds` - 1; the folds differ by at most one part.

    Images of one part are in the same fold.

    Args:
        parts: As in `split_normal_images`.
        num_folds: At least 2.
        seed: Random seed of the division.

    Raises:
        DataError: There are fewer parts than folds.
    """
    distinct = list(dict.fromkeys(parts))
    if len(distinct) < num_folds:
        raise DataError(
            f"evaluation.folds must be at most the number of distinct images, {len(distinct)}, "
            f"got {num_folds}; add normal images or take fewer folds."
        )
    random.Random(seed).shuffle(distinct)
    fold_of = {part: i % num_folds for i, part in enumerate(distinct)}
    return [fold_of[part] for part in parts]


def _listed(values: Iterable[object]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}"
