from collections import Counter

import pytest

from anomaly_detection.data import draw_folds, split_normal_images
from anomaly_detection.errors import DataError


def hashes(number: int) -> list[str]:
    return [f"{i:04x}" for i in range(number)]


@pytest.mark.parametrize(
    ("number", "validation", "calibration", "expected"),
    [
        (20, 0.15, 0.15, {"fit": 14, "validation": 3, "calibration": 3}),
        (10, 0.1, 0.3, {"fit": 6, "validation": 1, "calibration": 3}),
        (7, 0.4, 0.2, {"fit": 3, "validation": 3, "calibration": 1}),  # 2.8 and 1.4
        (3, 0.33, 0.33, {"fit": 1, "validation": 1, "calibration": 1}),
    ],
)
def test_each_split_gets_its_rounded_share(number, validation, calibration, expected):
    assert Counter(split_normal_images(hashes(number), validation, calibration, 0)) == expected


def test_identical_contents_share_a_split_and_count_once():
    contents = hashes(10)
    copies = contents * 3 + contents[:1] * 50
    splits = split_normal_images(copies, 0.1, 0.3, 0)
    split_of = dict(zip(copies, splits, strict=True))
    assert splits == [split_of[content] for content in copies]
    assert Counter(split_of.values()) == {"fit": 6, "validation": 1, "calibration": 3}


def test_same_seed_draws_the_same_splits():
    assert split_normal_images(hashes(40), 0.2, 0.2, 3) == split_normal_images(
        hashes(40), 0.2, 0.2, 3
    )


def test_another_seed_draws_other_splits():
    drawn = {tuple(split_normal_images(hashes(40), 0.2, 0.2, seed)) for seed in range(5)}
    assert len(drawn) == 5


def test_splits_are_not_in_the_order_of_the_images():
    splits = split_normal_images(hashes(40), 0.2, 0.2, 0)
    assert splits != sorted(splits)
    assert splits != sorted(splits, reverse=True)


@pytest.mark.parametrize(
    ("contents", "fractions", "numbers"),
    [
        (hashes(2), (0.15, 0.15), "got 2, 0 and 0 of 2 distinct"),
        (hashes(1) * 100, (0.3, 0.3), "got 1, 0 and 0 of 1 distinct"),
        (hashes(10), (0.04, 0.3), "got 7, 0 and 3 of 10 distinct"),
        (hashes(10), (0.3, 0.04), "got 7, 3 and 0 of 10 distinct"),
        (hashes(10), (0.5, 0.49), "got 0, 5 and 5 of 10 distinct"),
        ([], (0.3, 0.3), "got 0, 0 and 0 of 0 distinct"),
    ],
)
def test_too_few_images_for_each_split_to_get_one_are_refused(contents, fractions, numbers):
    with pytest.raises(DataError, match=numbers) as error:
        split_normal_images(contents, *fractions, 0)
    assert "each of fit, validation and calibration must get an image" in str(error.value)
    assert "data.validation_fraction" in str(error.value)


def test_folds_differ_by_at_most_one_content_and_keep_copies_together():
    contents = hashes(11)
    copies = contents + contents[:3] * 4
    folds = draw_folds(copies, 4, 0)
    fold_of = dict(zip(copies, folds, strict=True))
    assert [fold_of[content] for content in copies] == folds
    assert sorted(Counter(fold_of.values()).values()) == [2, 3, 3, 3]
    assert draw_folds(copies, 4, 0) == folds != draw_folds(copies, 4, 1)


def test_more_folds_than_contents_are_refused():
    with pytest.raises(DataError, match=r"folds must be at most the number .*, 3, got 4; add"):
        draw_folds(hashes(3) * 2, 4, 0)
