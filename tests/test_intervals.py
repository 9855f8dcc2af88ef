import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from anomaly_detection.metrics import (
    auroc_difference,
    auroc_interval,
    compute_auroc,
    compute_f1,
    f1_interval,
    mcnemar_p_value,
    share_interval,
)

Z = stats.norm.ppf(0.975)
LABELS, SCORES = [0, 0, 1, 1], [1, 3, 2, 4]  # AUROC 3 / 4
ONE_CLASS = "must have both classes, 0 and 1"


def binormal(rng, num_normal, num_anomalous, distance, ties=False):
    """Labels, and scores whose true AUROC is Phi(distance / sqrt 2)."""
    labels = np.repeat([0, 1], [num_normal, num_anomalous])
    scores = rng.normal(size=len(labels)) + distance * labels
    return labels, scores.round() if ties else scores


def brute_force(labels, *scores):
    """AUROCs (K,) and their covariance (K, K) from all pairs, as DeLong et al. write it."""
    labels = np.asarray(labels)
    above, below = [], []
    for values in map(np.asarray, scores):
        pairs = values[labels == 1][:, None] - values[labels == 0]
        right = (pairs > 0) + 0.5 * (pairs == 0)
        above.append(right.mean(axis=1))
        below.append(right.mean(axis=0))
    covariance = sum(np.cov(part) / np.shape(part)[1] for part in (above, below))
    return np.mean(above, axis=1), np.atleast_2d(covariance)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (0, 1, 0, 0.975),
        (1, 1, 0.025, 1),
        (1, 2, 1 - 0.975**0.5, 0.975**0.5),
        (0, 20, 0, 1 - 0.025 ** (1 / 20)),
        (20, 20, 0.025 ** (1 / 20), 1),
    ],
)
def test_share_interval_by_hand(count, total, low, high):
    assert share_interval(count, total) == pytest.approx((low, high))


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(("count", "total"), [(1, 7), (3, 7), (6, 7), (40, 100)])
def test_share_interval_is_made_of_beta_quantiles(count, total, confidence):
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, count, total - count + 1)
    high = stats.beta.ppf(1 - tail, count + 1, total - count)
    assert share_interval(count, total, confidence) == pytest.approx((low, high))


@pytest.mark.parametrize("total", [5, 20])
def test_share_interval_holds_every_true_share_at_least_as_often_as_it_says(total):
    low, high = np.array([share_interval(count, total) for count in range(total + 1)]).T
    for share in np.linspace(0, 1, 201):
        holds = (low <= share) & (share <= high)
        assert stats.binom.pmf(np.arange(total + 1), total, share)[holds].sum() >= 0.95


@pytest.mark.parametrize(("count", "total"), [(-1, 3), (4, 3), (0, 0)])
def test_a_count_that_is_no_part_of_the_total_is_an_error(count, total):
    with pytest.raises(ValueError, match=rf"in \[0, total\].*positive, got {count}, {total}"):
        share_interval(count, total)


def test_f1_interval_by_hand():
    # One image is both, one missed and one rejected: J = 1 / 3, F1 = 1 / 2.
    low, high = share_interval(1, 3)
    expected = (2 * low / (1 + low), 2 * high / (1 + high))
    assert f1_interval([0, 0, 1, 1], [0, 1, 1, 0]) == pytest.approx(expected)
    assert f1_interval([0, 1], [0, 1]) == pytest.approx((0.05 / 1.025, 1))
    high = 1 - 0.025**0.5
    assert f1_interval([0, 1], [1, 0]) == pytest.approx((0, 2 * high / (1 + high)))


def f1_data(rng, count, anomalous, hit, false):
    labels = (rng.random(count) < anomalous).astype(int)
    labels[:2] = 0, 1
    return labels, (rng.random(count) < np.where(labels == 1, hit, false)).astype(int)


def test_f1_interval_contains_f1():
    rng = np.random.default_rng(0)
    for hit in (0, 0.3, 0.9, 1):
        for _ in range(10):
            labels, predictions = f1_data(rng, 12, 0.4, hit, 0.2)
            low, high = f1_interval(predictions, labels)
            assert 0 <= low <= compute_f1(predictions, labels) <= high <= 1


@pytest.mark.parametrize(
    ("anomalous", "hit", "false"), [(0.5, 0.9, 0.05), (0.2, 0.7, 0.1), (0.7, 0.99, 0.3)]
)
def test_f1_interval_holds_the_true_f1(anomalous, hit, false):
    rng = np.random.default_rng(1)
    both = anomalous * hit
    true = 2 * both / (both + anomalous + (1 - anomalous) * false)
    intervals = [f1_interval(*f1_data(rng, 80, anomalous, hit, false)) for _ in range(400)]
    assert np.mean([low <= true <= high for low, high in intervals]) >= 0.93


def test_auroc_interval_by_hand():
    # Each anomalous image is above 1/2 and 1 of the normal ones, each normal one below 1 and 1/2
    # of the anomalous ones: variances 1/8, of two images each.
    half = Z * np.sqrt(1 / 8 / 2 + 1 / 8 / 2) / (3 / 4 * 1 / 4)
    expected = expit([np.log(3) - half, np.log(3) + half])
    assert auroc_interval(SCORES, LABELS) == pytest.approx(expected)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("num_normal", "num_anomalous"), [(10, 15), (30, 17), (40, 40)])
def test_auroc_interval_is_that_of_all_pairs(num_normal, num_anomalous, ties):
    labels, scores = binormal(np.random.default_rng(3), num_normal, num_anomalous, 0.7, ties)
    area, covariance = brute_force(labels, scores)
    half = Z * np.sqrt(covariance[0, 0]) / (area[0] * (1 - area[0]))
    expected = expit([logit(area[0]) - half, logit(area[0]) + half])
    assert auroc_interval(scores, labels) == pytest.approx(expected)
    assert area[0] == pytest.approx(compute_auroc(scores, labels))


@pytest.mark.parametrize(
    ("num_normal", "num_anomalous", "distance"),
    [(40, 40, 0.5), (40, 40, 1.5), (100, 20, 1.5), (20, 100, 1.0), (30, 30, 2.5)],
)
def test_auroc_interval_holds_the_true_auroc(num_normal, num_anomalous, distance):
    rng = np.random.default_rng(4)
    true = stats.norm.cdf(distance / np.sqrt(2))
    intervals = [
        auroc_interval(*binormal(rng, num_normal, num_anomalous, distance)) for _ in range(400)
    ]
    coverage = np.mean([low <= true <= high for low, high in intervals])
    assert 0.92 <= coverage <= 0.985


@pytest.mark.parametrize("distance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("num_normal", "num_anomalous"), [(40, 2), (200, 2), (40, 3), (5, 40)])
def test_auroc_interval_of_few_images_holds_the_true_auroc(num_normal, num_anomalous, distance):
    rng = np.random.default_rng(12)
    true = stats.norm.cdf(distance / np.sqrt(2))
    intervals = [
        auroc_interval(*binormal(rng, num_normal, num_anomalous, distance)) for _ in range(400)
    ]
    assert np.mean([low <= true <= high for low, high in intervals]) >= 0.9


def test_auroc_interval_of_few_images_is_at_least_that_of_hanley_and_mcneil():
    # Both anomalous images are above 2 of 3 normal ones, so that DeLong's variance of them is 0,
    # and the normal ones' is that of 0, 0 and 1 by 3, 1/9. Area 2/3: Q1 = 1/2, Q2 = 8/15, and
    # (2/9 + (1/2 - 4/9) + 2 (8/15 - 4/9)) / 6 = 41/540, which is less than 1/9.
    labels, scores = np.array([0, 0, 0, 1, 1]), np.array([1.0, 2.0, 9.0, 4.0, 5.0])
    half = Z * np.sqrt(1 / 9) / (2 / 9)
    expected = expit([np.log(2) - half, np.log(2) + half])
    assert auroc_interval(scores, labels) == pytest.approx(expected)
    # With four times as many normal images of the same shares DeLong's is 2/99, and the other one
    # (2/9 + (1/2 - 4/9) + 11 (8/15 - 4/9)) / 24 = 113/2160.
    labels, scores = np.r_[np.zeros(12, int), 1, 1], np.r_[np.ones(8), 9 * np.ones(4), 4.0, 5.0]
    half = Z * np.sqrt(113 / 2160) / (2 / 9)
    expected = expit([np.log(2) - half, np.log(2) + half])
    assert auroc_interval(scores, labels) == pytest.approx(expected)


def test_two_perfect_orders_that_differ_are_not_certain_to_be_equally_good():
    labels = np.array([0, 0, 0, 1, 1, 1])
    scores, others = np.array([1, 2, 3, 4, 5, 6.0]), np.array([3, 2, 1, 6, 5, 4.0])
    difference, (low, high) = auroc_difference(labels, scores, others)
    width = 1 - share_interval(3, 3)[0]
    assert (difference, low, high) == pytest.approx((0, -width, width))
    difference, (low, high) = auroc_difference(labels, scores, -scores)
    assert (difference, low, high) == pytest.approx((1, 1 - width, 1))


def test_auroc_interval_contains_the_auroc_and_is_within_0_and_1():
    rng = np.random.default_rng(5)
    for distance in (-4, -1, 0, 1, 4):
        for count in (2, 3, 10):
            labels, scores = binormal(rng, count, 3, distance, ties=True)
            low, high = auroc_interval(scores, labels)
            assert 0 <= low <= compute_auroc(scores, labels) <= high <= 1
            assert high - low > 0.05


@pytest.mark.parametrize(("num_normal", "num_anomalous"), [(10, 4), (4, 10), (1, 1)])
def test_separated_classes_have_the_interval_of_the_smaller_ones_share(num_normal, num_anomalous):
    smaller = min(num_normal, num_anomalous)
    labels = np.repeat([0, 1], [num_normal, num_anomalous])
    assert auroc_interval(labels, labels) == pytest.approx((0.025 ** (1 / smaller), 1))
    assert auroc_interval(labels, -labels) == pytest.approx((0, 1 - 0.025 ** (1 / smaller)))


def test_equal_scores_say_little():
    low, high = auroc_interval(np.repeat([0, 1], 5), np.ones(10))
    assert low < 0.5 < high
    assert high - low > 0.7


def test_auroc_interval_depends_on_the_order_alone():
    labels, scores = binormal(np.random.default_rng(6), 30, 20, 1)
    low, high = auroc_interval(scores, labels)
    assert auroc_interval(np.exp(scores[::-1]), labels[::-1]) == pytest.approx((low, high))
    assert auroc_interval(1 - labels, scores) == pytest.approx((1 - high, 1 - low))


def test_intervals_are_wider_at_higher_confidence():
    labels, scores = binormal(np.random.default_rng(7), 30, 20, 1)
    for interval in (
        lambda confidence: auroc_interval(scores, labels, confidence),
        lambda confidence: f1_interval(scores > 0.5, labels, confidence),
        lambda confidence: share_interval(3, 10, confidence),
        lambda confidence: auroc_difference(labels, scores, scores**2, confidence)[1],
    ):
        (low, high), (lower, higher) = interval(0.8), interval(0.99)
        assert lower < low < high < higher


def test_auroc_difference_by_hand():
    # The other scores are the first ones' negatives: AUROC 3/4 and 1/4, covariance -1/8.
    half = Z * np.sqrt(1 / 8 + 1 / 8 + 2 / 8)
    difference, interval = auroc_difference(LABELS, SCORES, -np.array(SCORES))
    assert difference == pytest.approx(0.5)
    assert interval == pytest.approx((0.5 - half, min(0.5 + half, 1)))


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_difference_is_that_of_all_pairs(ties):
    rng = np.random.default_rng(8)
    labels, scores = binormal(rng, 25, 15, 1, ties)
    other = scores + rng.normal(size=40)
    area, covariance = brute_force(labels, scores, other)
    half = Z * np.sqrt(np.array([1, -1]) @ covariance @ [1, -1])
    difference, interval = auroc_difference(labels, scores, other)
    assert difference == pytest.approx(area[0] - area[1])
    assert interval == pytest.approx((difference - half, difference + half))


def test_the_same_scores_do_not_differ():
    labels, scores = binormal(np.random.default_rng(9), 30, 20, 1)
    difference, interval = auroc_difference(labels, scores, 2 * scores + 1)
    assert difference == 0
    assert interval == pytest.approx((0, 0), abs=1e-7)


def test_auroc_difference_is_antisymmetric():
    rng = np.random.default_rng(10)
    labels, scores = binormal(rng, 30, 20, 1)
    other = scores + rng.normal(size=50)
    difference, (low, high) = auroc_difference(labels, scores, other)
    assert auroc_difference(labels, other, scores) == (
        pytest.approx(-difference),
        pytest.approx((-high, -low)),
    )


def test_correlated_scores_have_a_narrower_difference_than_independent_ones():
    rng = np.random.default_rng(11)
    labels, scores = binormal(rng, 60, 60, 1)
    _, independent = binormal(rng, 60, 60, 1)
    widths = [
        np.ptp(auroc_difference(labels, scores, other)[1])
        for other in (scores + 0.1 * rng.normal(size=120), independent)
    ]
    assert widths[0] < 0.4 * widths[1]


def test_auroc_difference_holds_the_true_difference():
    rng = np.random.default_rng(12)
    true = stats.norm.cdf(1.5 / np.sqrt(2)) - stats.norm.cdf(1.5 / np.sqrt(2) / np.sqrt(2))
    held = []
    for _ in range(400):
        labels, scores = binormal(rng, 40, 40, 1.5)
        low, high = auroc_difference(labels, scores, scores + rng.normal(size=80))[1]
        held.append(low <= true <= high)
    assert 0.92 <= np.mean(held) <= 0.985


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0, 0, 1),
        (1, 1, 1),
        (5, 0, 2 * 0.5**5),
        (0, 5, 2 * 0.5**5),
        (4, 1, 2 * (1 + 5) * 0.5**5),
        (20, 20, 1),
    ],
)
def test_mcnemar_p_value_by_hand(first, second, expected):
    assert mcnemar_p_value(first, second) == pytest.approx(expected)


@pytest.mark.parametrize(
    "compute",
    [
        auroc_interval,
        f1_interval,
        lambda labels, scores: auroc_difference(labels, scores, scores),
    ],
)
def test_one_class_has_no_interval(compute):
    with pytest.raises(ValueError, match=ONE_CLASS):
        compute([0, 0, 0], [0, 1, 1])


@pytest.mark.parametrize(
    ("scores", "text"), [([1, 2, 3], "same shape"), ([1, 2, 3, np.nan], "must be finite, got 1")]
)
def test_scores_that_do_not_fit_are_an_error(scores, text):
    for arguments in ((LABELS, scores, SCORES), (LABELS, SCORES, scores)):
        with pytest.raises(ValueError, match=text):
            auroc_difference(*arguments)
    with pytest.raises(ValueError, match=text):
        auroc_interval(scores, LABELS)


def test_one_image_of_a_class_says_little_of_it():
    labels = np.repeat([0, 1], [100, 1])
    low, high = auroc_interval(np.r_[np.arange(100), 94.5], labels)
    assert low < 0.5 < 0.95 < high


@pytest.mark.parametrize("distance", [0.5, 1.5, 2.5])
def test_auroc_interval_of_a_single_anomalous_image_holds_the_true_auroc(distance):
    rng = np.random.default_rng(13)
    true = stats.norm.cdf(distance / np.sqrt(2))
    intervals = [auroc_interval(*binormal(rng, 60, 1, distance)) for _ in range(150)]
    assert np.mean([low <= true <= high for low, high in intervals]) >= 0.95
