"""How many images a threshold needs, and what an error says would do."""

import re

import pytest
from builders.images import write_category

from anomaly_detection.data import prepare_category
from anomaly_detection.data.calibration import (
    images_needed,
    require_calibration_images,
    round_up,
    too_few,
)
from anomaly_detection.errors import DataError
from anomaly_detection.evaluation.thresholds import ThresholdError, false_reject_threshold

DEFAULTS = {"validation_fraction": 0.15, "calibration_fraction": 0.15, "test_fraction": 0.0}


def refusal(num_normal: int, **changes) -> str:
    options = {**DEFAULTS, "rate": 0.05, "method": "split", **changes}
    with pytest.raises(DataError) as error:
        require_calibration_images(num_normal, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("rate", "needed"), [(0.5, 1), (0.25, 3), (0.05, 19), (0.01, 99), (0.3, 3)]
)
def test_the_rule_is_that_of_the_threshold(rate, needed):
    assert images_needed(rate) == needed
    false_reject_threshold(range(needed), rate)
    if needed > 1:
        with pytest.raises(ThresholdError, match=re.escape(too_few(rate, needed - 1))):
            false_reject_threshold(range(needed - 1), rate)


def test_a_hundred_images_are_told_what_would_do():
    assert refusal(100) == (
        "evaluation.false_reject_rate 0.05 needs at least 19 calibration images, got 15 of 100 "
        "normal images; 127 normal images would do, or set evaluation.false_reject_rate to 0.0625, "
        "or data.calibration_fraction to 0.19, or evaluation.calibration to cross, where 85 images "
        "calibrate."
    )


@pytest.mark.parametrize("test_fraction", [0.0, 0.15])
@pytest.mark.parametrize("method", ["split", "cross"])
@pytest.mark.parametrize("rate", [0.3, 0.05, 0.01, 0.003])
@pytest.mark.parametrize("num_normal", [10, 23, 60, 100, 126])
def test_whatever_the_message_offers_would_do(num_normal, rate, method, test_fraction):
    given = {**DEFAULTS, "rate": rate, "method": method, "test_fraction": test_fraction}
    try:
        require_calibration_images(num_normal, **given)
        return
    except DataError as error:
        text = str(error)
    offers = [{"rate": float(re.search(r"false_reject_rate to ([\d.]+\d)", text)[1])}]
    if found := re.search(r"calibration_fraction to ([\d.]+\d)", text):
        offers.append({"calibration_fraction": float(found[1])})
    if "evaluation.calibration to cross" in text:
        offers.append({"method": "cross"})
    for offer in offers:
        require_calibration_images(num_normal, **given | offer)
    images = int(re.search(r"(\d+) normal images would do", text)[1])
    require_calibration_images(images, **given)
    assert images > num_normal


def test_what_would_not_do_is_not_offered():
    text = refusal(21)  # 3 of them validate
    assert "cross" not in text
    assert "fraction" not in text
    assert "fraction" not in refusal(21, method="cross")


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [(1 / 16, 3, 0.0625), (1 / 12, 3, 0.0834), (0.19, 2, 0.19), (0.1901, 2, 0.2), (2.0, 2, 2.0)],
)
def test_numbers_are_rounded_up(value, digits, expected):
    assert round_up(value, digits) == expected


def test_identical_images_count_once_and_nothing_is_decoded(tmp_path):
    category = write_category(tmp_path / "data" / "part", num_train=20, num_test=1)
    options = {"image_size": 32, "bit_depth": 16, "seed": 0, "false_reject_rate": 0.25}
    fractions = {"validation_fraction": 0.15, "calibration_fraction": 0.15}
    prepare_category(tmp_path / "data", "part", tmp_path / "out", **options, **fractions)
    for path in sorted((category / "train/good").iterdir())[14:]:
        path.write_bytes((category / "train/good/000.png").read_bytes())
    (category / "test/dark/000.png").write_text("no image")
    with pytest.raises(DataError, match=r"part: .* needs at least 3 .*, got 2 of 14 normal images"):
        prepare_category(tmp_path / "data", "part", tmp_path / "out", **options, **fractions)
