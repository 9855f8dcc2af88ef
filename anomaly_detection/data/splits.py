"""Divide normal images by use (gradients, choice of checkpoint, threshold) or into folds."""

import random
from collections.abc import Sequence

from anomaly_detection.errors import DataError


def split_normal_images(
    hashes: Sequence[str], validation_fraction: float, calibration_fraction: float, seed: int
) -> list[str]:
    """The split of each normal training image: `fit`, `validation` or `calibration`.

    Images with identical content get the same split. Fractions refer to distinct contents.

    Args:
        hashes: Content hashes, in an order that does not depend on the file system.
        validation_fraction: Share that chooses the checkpoint, in (0, 1).
        calibration_fraction: Share that sets the threshold, in (0, 1).
        seed: Random seed of the split.

    Raises:
        DataError: There are too few images for every split to get one.
    """
    contents = list(dict.fromkeys(hashes))
    num_validation = round(len(contents) * validation_fraction)
    num_calibration = round(len(contents) * calibration_fraction)
    num_fit = len(contents) - num_validation - num_calibration
    if min(num_fit, num_validation, num_calibration) < 1:
        raise DataError(
            "each of fit, validation and calibration must get an image, got "
            f"{num_fit}, {num_validation} and {num_calibration} of {len(contents)} distinct "
            "images; add normal images or change data.validation_fraction and "
            "data.calibration_fraction."
        )
    random.Random(seed).shuffle(contents)
    names = ["fit"] * num_fit + ["validation"] * num_validation + ["calibration"] * num_calibration
    split_of = dict(zip(contents, names, strict=True))
    return [split_of[content] for content in hashes]


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
