"""Thresholds and p-values from the scores of calibration images."""

import re

import numpy as np
import pytest

from anomaly_detection.evaluation.thresholds import (
    ThresholdError,
    adaptive_threshold,
    choose_threshold,
    false_reject_bounds,
    false_reject_threshold,
    quantile_threshold,
    thresholds_by_rate,
)
from anomaly_detection.inference import p_value


@pytest.mark.parametrize(
    ("count", "rate", "rank_from_top"),
    [
        (19, 0.05, 1),
        (39, 0.05, 2),
        (38, 0.05, 1),  # 39 * 0.05 = 1.95: one short of the second
        (99, 0.29, 29),  # 100 * 0.29 is 28.999999999999996 in floating point
        (1, 0.5, 1),
    ],
)
def test_false_reject_threshold_by_hand(count, rate, rank_from_top):
    scores = np.random.default_rng(0).permutation(count) + 1.0
    assert false_reject_threshold(scores, rate) == count + 1 - rank_from_top


def test_the_thresholds_of_other_rates_are_those_of_the_method_or_say_how_many_images_they_need():
    scores = np.arange(1.0, 20.0)
    first, *others = thresholds_by_rate(scores)
    assert first == {"rate": 0.02, "threshold": None, "images_needed": 49}
    assert [row["rate"] for row in others] == [0.05, 0.1, 0.2, 0.3]
    expected = [false_reject_threshold(scores, row["rate"]) for row in others]
    assert [row["threshold"] for row in others] == expected == [19, 18, 16, 14]


def test_quantile_threshold_by_hand():
    quantiles = [0.25, 0.26, 0.5, 0.75, 0.76, 1.0]
    assert [quantile_threshold([4, 1, 3, 2], q) for q in quantiles] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("count", [19, 20, 333])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25])
def test_no_more_than_the_rate_of_its_own_sample_lies_above_the_threshold(count, rate):
    scores = np.random.default_rng(count).normal(size=count)
    assert (scores > false_reject_threshold(scores, rate)).mean() <= rate
    assert (scores > quantile_threshold(scores, 1 - rate)).mean() <= rate


def test_the_threshold_is_a_score_and_does_not_reject_itself_nor_its_ties():
    scores = np.float32([0.1] * 18 + [0.3] * 4)
    for threshold in (false_reject_threshold(scores, 0.05), quantile_threshold(scores, 0.95)):
        assert threshold in scores
        assert not (scores > threshold).any()


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1, 0.3])
def test_new_normal_images_exceed_it_with_the_rate_asked_for_and_not_much_less(rate):
    # Of uniform scores the share above a threshold is 1 - threshold.
    count = 50
    calibrations = np.random.default_rng(5).random((2000, count))
    shares = [1 - false_reject_threshold(scores, rate) for scores in calibrations]
    luck = 3 * np.std(shares) / np.sqrt(len(shares))  # of 2,000 draws; below a quarter of 1 / 51
    assert rate - 1 / (count + 1) - luck < np.mean(shares) < rate + luck


def test_thresholds_follow_any_monotone_change_of_the_scores():
    scores = np.random.default_rng(1).normal(size=60)
    for threshold in (false_reject_threshold, quantile_threshold):
        assert threshold(np.exp(scores), 0.1) == np.exp(threshold(scores, 0.1))


@pytest.mark.parametrize(("count", "rate", "needed"), [(18, 0.05, 19), (98, 0.01, 99), (2, 0.3, 3)])
def test_too_few_images_are_an_error_that_says_how_many_and_which_rate(count, rate, needed):
    text = f"rate {rate} needs at least {needed} calibration images, got {count}"
    with pytest.raises(ThresholdError, match=re.escape(text)) as error:
        false_reject_threshold(np.arange(count), rate)
    allowed = float(re.search(r"set the rate to ([\d.]+\d)", str(error.value))[1])
    assert allowed == pytest.approx(1 / (count + 1), rel=0.01)
    false_reject_threshold(np.arange(count), allowed)
    assert false_reject_threshold(np.arange(needed), rate) == needed - 1


@pytest.mark.parametrize("threshold", [false_reject_threshold, quantile_threshold])
@pytest.mark.parametrize(
    "scores", [[], [0.1, np.nan] * 20, [np.inf] + [0.1] * 20, np.ones((20, 1))]
)
def test_scores_that_are_no_finite_list_are_an_error(threshold, scores):
    with pytest.raises(ThresholdError, match=r"must be finite and of shape \(n,\), n > 0"):
        threshold(scores, 0.5)


def test_bounds_of_the_false_reject_rate_by_hand():
    # None of 19 above: Beta(1, 19) has the mean 1 / 20 and the quantile 1 - 0.05 ** (1 / 19).
    bounds = false_reject_bounds(np.arange(19), 18.0)
    assert bounds == pytest.approx({"expected": 1 / 20, "upper_95": 1 - 0.05 ** (1 / 19)})
    # A threshold below all scores promises nothing.
    assert false_reject_bounds(np.arange(5), -1.0)["upper_95"] == 1.0


def test_the_upper_bound_is_exceeded_in_one_calibration_set_of_twenty():
    rng = np.random.default_rng(0)
    exceeded = 0
    for _ in range(2000):
        scores = rng.random(60)  # the share of normal images above t is 1 - t
        threshold = false_reject_threshold(scores, 0.1)
        exceeded += 1 - threshold > false_reject_bounds(scores, threshold)["upper_95"]
    assert 0.035 < exceeded / 2000 < 0.065


def test_the_adaptive_threshold_separates_what_can_be_separated():
    assert adaptive_threshold([0.1, 0.3, 0.2], [0.9, 0.7]) == pytest.approx(0.5)
    assert 0.2 <= adaptive_threshold([0.1, 0.2, 0.4], [0.3, 0.9, 0.8, 0.7]) < 0.3


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("false_reject_rate", 18.0),  # one of 20 may be above: the highest but one
        ("quantile", 10.0),
        ("adaptive", 0.5 * (19 + 30)),
        ("manual", 0.125),
    ],
)
def test_each_method_chooses_its_threshold_and_only_one_needs_defects(method, expected):
    asked = []
    threshold = choose_threshold(
        method,
        np.arange(1.0, 20.0),
        false_reject_rate=0.1,
        quantile=0.5,
        manual=0.125,
        synthetic_scores=lambda: asked.append(method) or [30.0, 40.0],
    )
    assert threshold == expected
    assert asked == ["adaptive"] * (method == "adaptive")


def test_p_value_by_hand():
    # Of three calibration scores as many as are at least as high, and the image itself, of four.
    expected = {0.5: 1.0, 1.0: 1.0, 1.5: 0.75, 2.0: 0.75, 3.0: 0.5, 9: 0.25}
    assert {score: p_value(score, [3.0, 1.0, 2.0]) for score in expected} == expected


def test_p_values_of_normal_images_are_uniform():
    draws, count = 20_000, 9
    scores = np.random.default_rng(0).normal(size=(draws, count + 1))
    values = np.array([p_value(row[0], row[1:]) for row in scores])
    for k in range(1, count + 2):
        share = k / (count + 1)
        luck = 4 * np.sqrt(share * (1 - share) / draws)
        assert np.mean(values <= share + 1e-9) == pytest.approx(share, abs=luck + 1e-9)


def test_ties_make_p_values_larger_and_never_smaller():
    scores = np.random.default_rng(0).integers(0, 3, size=(5000, 10))
    values = np.array([p_value(row[0], row[1:]) for row in scores])
    for share in (0.1, 0.3, 0.5, 0.9):
        assert np.mean(values <= share) <= share + 4 * np.sqrt(share * (1 - share) / 5000)


def test_what_is_above_the_threshold_has_a_p_value_of_the_rate_or_less():
    scores = np.random.default_rng(3).random(59)
    threshold = false_reject_threshold(scores, 0.1)
    assert p_value(np.nextafter(threshold, 2), scores) <= 0.1 < p_value(threshold, scores)
