"""How many images must calibrate a threshold, and what to change where there are fewer."""

import math
from itertools import count

from anomaly_detection.data.splits import split_counts
from anomaly_detection.errors import DataError

SPLIT, CROSS = "split", "cross"


def images_needed(rate: float) -> int:
    """The fewest calibration images with which a threshold can promise a false-reject rate.

    One of n + 1 exchangeable scores, the new one's, is the highest with probability 1 / (n + 1).
    """
    return math.ceil(1 / rate - 1e-9) - 1


def too_few(rate: float, number: int, unit: str = "images") -> str | None:
    """What to say if so many images, or parts, are too few to calibrate for a rate, else None."""
    if number >= images_needed(rate):
        return None
    return (
        f"evaluation.false_reject_rate {rate} needs at least {images_needed(rate)} calibration "
        f"{unit}, got {number}"
    )


def require_calibration_images(
    num_normal: int,
    validation_fraction: float,
    calibration_fraction: float,
    test_fraction: float,
    *,
    rate: float,
    method: str,
    unit: str = "images",
) -> None:
    """Refuse too few normal images to calibrate with.

    Args:
        num_normal: Distinct normal images to be divided.
        validation_fraction: As in `split_counts`.
        calibration_fraction: As in `split_counts`.
        test_fraction: As in `split_counts`.
        rate: The false-reject rate that the threshold is to promise.
        method: `SPLIT`: only those of the split `calibration` calibrate; `CROSS`: those of `fit`
            do as well.
        unit: `images`, or `parts` if some are shown by several images; those count once, since
            they are not independent.

    Raises:
        DataError: They are too few. The message says what would do: how many images, and which
            fraction, rate or method with those that there are.
    """

    def number(method: str, images: int, calibration: float = calibration_fraction) -> int:
        counts = split_counts(images, validation_fraction, calibration, test_fraction)
        return counts["calibration"] + (counts["fit"] if method == CROSS else 0)

    calibrating = number(method, num_normal)
    fault = too_few(rate, calibrating, unit)
    if fault is None:
        return
    needed = images_needed(rate)
    others = 1 - validation_fraction - test_fraction
    least = math.ceil(needed / (calibration_fraction if method == SPLIT else others))
    least = next(images for images in count(least) if number(method, images) >= needed)
    fixes = [f"evaluation.false_reject_rate to {round_up(1 / (calibrating + 1), 3)}"]
    fraction, crossed = round_up(needed / num_normal, 2), number(CROSS, num_normal)
    if method == SPLIT and fraction <= others / 2:  # the fit gets as many at least
        fixes.append(f"data.calibration_fraction to {fraction}")
    if method == SPLIT and crossed >= needed:
        fixes.append(f"evaluation.calibration to cross, where {crossed} {unit} calibrate")
    raise DataError(
        f"{fault} of {num_normal} normal {unit}; {least} normal {unit} would do, or set "
        f"{', or '.join(fixes)}."
    )


def round_up(value: float, digits: int) -> float:
    """The least number of so many significant digits that is not below a positive value."""
    scale = 10 ** (digits - 1 - math.floor(math.log10(value)))
    return math.ceil(value * scale - 1e-9) / scale
