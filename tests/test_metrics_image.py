"""Metrics of one score per image, and their confidence intervals."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from anomaly_detection import metrics
from anomaly_detection.metrics import (
    auroc_difference,
    auroc_interval,
    compute_auroc,
    compute_auroc_per_class,
    compute_average_precision,
    compute_f1,
    compute_f1_max,
    f1_interval,
    mcnemar_p_value,
    share_interval,
    visualization,
)

RANKED = [compute_auroc, compute_average_precision, lambda s, y: compute_f1_max(s, y)[0]]
ALL = [*RANKED, compute_f1]
Z = stats.norm.ppf(0.975)
LABELS, SCORES = [0, 0, 1, 1], [1, 3, 2, 4]  # AUROC 3 / 4


def random_case(seed, size=200, levels=None):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % 3 == 0).astype(int)
    scores = rng.normal(size=size) + labels
    return (scores if levels is None else np.round(scores * levels) / levels), labels


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], 1.0),
        ([0, 0, 1, 1], [0.4, 0.3, 0.2, 0.1], 0.0),
        ([0, 1], [7.0, 7.0], 0.5),
        # Pairs (anomalous, normal): 3 > 1, 3 > 2, 2 > 1 won, 2 = 2 half: 3.5 of 4.
        ([0, 0, 1, 1], [1, 2, 2, 3], 3.5 / 4),
    ],
)
def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_half(labels, scores, expected):
    assert compute_auroc(scores, labels) == pytest.approx(expected)


def test_average_precision_and_f1_by_hand():
    # From the highest score down: hit (1/1), miss, hit (2/3); each hit is half of the recall.
    assert compute_average_precision([4, 3, 2, 1], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)
    # 2 true positives, 1 false positive, 1 miss: 2 * 2 / (2 * 2 + 1 + 1).
    assert compute_f1([1, 1, 0, 1, 0], [1, 1, 1, 0, 0]) == pytest.approx(2 / 3)
    assert compute_f1([0, 0, 0], [0, 1, 1]) == 0


@pytest.mark.parametrize(
    ("labels", "scores", "expected", "low", "high"),
    [
        ([0, 0, 1, 1], [1, 2, 3, 4], 1.0, 2, 3),
        # Down to 2: 2 hits and 1 false alarm, 4 / 5; down to 4: 1 hit and 1 miss, 2 / 3.
        ([0, 1, 0, 1], [1, 2, 3, 4], 4 / 5, 1, 2),
        # Inverted: everything is called anomalous, 2 * 2 / (4 + 2).
        ([1, 1, 0, 0], [1, 2, 3, 4], 2 / 3, -np.inf, 1),
        ([0, 0, 0, 1], [5, 5, 5, 5], 2 / 5, -np.inf, 5),
    ],
)
def test_best_f1_and_its_threshold_by_hand(labels, scores, expected, low, high):
    best, threshold = compute_f1_max(scores, labels)
    assert best == pytest.approx(expected)
    assert low < threshold < high


@pytest.mark.parametrize("low", [np.float32(1 + 2**-23), 1 + 2**-52])
def test_best_threshold_separates_scores_that_are_neighbouring_floats(low):
    scores = np.array([low, np.nextafter(low, low + 1)])
    best, threshold = compute_f1_max(scores, [0, 1])
    assert best == 1
    assert (scores > threshold).tolist() == [False, True]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [None, 2])
def test_metrics_equal_scikit_learn_and_brute_force(seed, levels):
    scores, labels = random_case(seed, 60, levels)
    best, threshold = compute_f1_max(scores, labels)
    precision = average_precision_score(labels, scores)
    assert compute_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert compute_average_precision(scores, labels) == pytest.approx(precision)
    cuts = [-np.inf, *np.unique(scores)]
    assert best == pytest.approx(max(f1_score(labels, scores > cut) for cut in cuts))
    assert compute_f1(scores > threshold, labels) == pytest.approx(best)


@pytest.mark.parametrize("metric", RANKED)
@pytest.mark.parametrize("change", [np.exp, lambda s: 1000 * s - 5, lambda s: s**3])
def test_metrics_depend_on_the_order_of_the_scores_only(metric, change):
    scores, labels = random_case(0)
    assert metric(change(scores), labels) == pytest.approx(metric(scores, labels))


@pytest.mark.parametrize("metric", ALL)
def test_metrics_do_not_depend_on_the_order_of_the_images(metric):
    scores, labels = random_case(1)
    scores = (scores > 0.5).astype(int) if metric is compute_f1 else scores
    order = np.random.default_rng(0).permutation(len(labels))
    assert metric(scores[order], labels[order]) == pytest.approx(metric(scores, labels))


def test_auroc_per_class_takes_all_normal_images_and_one_class_by_hand():
    scores = [1, 3, 2, 4, 5]
    # hole: 2 > 1, 4 > 1, 4 > 3 of 4 pairs; crack: both pairs.
    for normal in ("good", "hole"):  # the classes of normal images are ignored
        classes = ["", normal, "hole", "hole", "crack"]
        found = compute_auroc_per_class(scores, [0, 0, 1, 1, 1], classes)
        assert found == {"crack": 1.0, "hole": 0.75}


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0], [1, 2], r"both classes, 0 and 1, got only \[0\]"),
        ([1, 1], [1, 2], r"both classes, 0 and 1, got only \[1\]"),
        ([], [], r"both classes, 0 and 1, got only \[\]"),
        ([0, 1, 2], [1, 2, 3], r"labels must be 0 or 1, got 2\."),
        ([0, 1], [1, 2, 3], r"same shape \(N,\), got \(3,\) and \(2,\)"),
        ([[0], [1]], [[1], [2]], r"same shape \(N,\), got \(2, 1\) and \(2, 1\)"),
        ([0, 1, 1], [1, np.nan, np.inf], "scores must be finite, got 2 that are not"),
    ],
)
def test_images_that_define_no_metric_and_no_interval_are_an_error(labels, scores, message):
    def difference(scores, labels):
        return auroc_difference(scores, scores, labels)

    for metric in (*ALL, auroc_interval, f1_interval, difference):
        with pytest.raises(ValueError, match=message):
            metric(scores, labels)


def test_the_other_scores_of_a_difference_must_fit_too():
    for scores, message in (([1, 2, 3], "same shape"), ([1, 2, 3, np.nan], "be finite, got 1")):
        with pytest.raises(ValueError, match=message):
            auroc_difference(SCORES, scores, LABELS)


def test_auroc_per_class_needs_a_class_for_each_image():
    with pytest.raises(ValueError, match=r"class_names must have shape \(2,\), got \(3,\)"):
        compute_auroc_per_class([1, 2], [0, 1], ["good", "hole", "hole"])


def test_metrics_load_no_matplotlib_until_a_plot_is_asked_for():
    code = (
        "import sys; from anomaly_detection import metrics; print('matplotlib' in sys.modules);"
        "metrics.plot_roc_curve; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_metrics_have_the_plots_of_metrics_and_no_other_names_than_theirs():
    assert metrics.plot_roc_curve is visualization.plot_roc_curve
    with pytest.raises(AttributeError, match="plot_nothing"):
        metrics.plot_nothing  # noqa: B018, the lookup is what is tested


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_share_interval_is_made_of_beta_quantiles_or_of_powers_for_none_and_all(confidence):
    tail = (1 - confidence) / 2
    for count, total in ((1, 2), (1, 7), (3, 7), (6, 7), (40, 100)):
        low = stats.beta.ppf(tail, count, total - count + 1)
        high = stats.beta.ppf(1 - tail, count + 1, total - count)
        assert share_interval(count, total, confidence) == pytest.approx((low, high))
    for total in (1, 20):
        root = tail ** (1 / total)
        assert share_interval(0, total, confidence) == pytest.approx((0, 1 - root))
        assert share_interval(total, total, confidence) == pytest.approx((root, 1))


@pytest.mark.parametrize("total", [5, 20])
def test_share_interval_holds_every_true_share_at_least_as_often_as_it_says(total):
    low, high = np.array([share_interval(count, total) for count in range(total + 1)]).T
    shares = np.linspace(0, 1, 201)[:, None]
    probabilities = stats.binom.pmf(np.arange(total + 1), total, shares)
    holds = (low <= shares) & (shares <= high)
    assert (probabilities * holds).sum(axis=1).min() >= 0.95


@pytest.mark.parametrize(("count", "total"), [(-1, 3), (4, 3), (0, 0)])
def test_a_count_that_is_no_part_of_the_total_is_an_error(count, total):
    with pytest.raises(ValueError, match=rf"in \[0, total\].*positive, got {count}, {total}"):
        share_interval(count, total)


def test_f1_interval_by_hand():
    # One image is both, one missed and one rejected: J = 1 / 3, F1 = 1 / 2.
    low, high = share_interval(1, 3)
    expected = (2 * low / (1 + low), 2 * high / (1 + high))
    assert f1_interval([0, 1, 1, 0], [0, 0, 1, 1]) == pytest.approx(expected)
    assert f1_interval([0, 1], [0, 1]) == pytest.approx((0.05 / 1.025, 1))
    high = 1 - 0.025**0.5
    assert f1_interval([1, 0], [0, 1]) == pytest.approx((0, 2 * high / (1 + high)))


def f1_data(rng, count, anomalous, hit, false):
    labels = (rng.random(count) < anomalous).astype(int)
    labels[:2] = 0, 1
    return (rng.random(count) < np.where(labels == 1, hit, false)).astype(int), labels


@pytest.mark.parametrize(
    ("anomalous", "hit", "false"),
    [
        (0.5, 0.9, 0.05),
        pytest.param(0.2, 0.7, 0.1, marks=pytest.mark.exhaustive),
        pytest.param(0.7, 0.99, 0.3, marks=pytest.mark.exhaustive),
    ],
)
def test_f1_interval_holds_the_true_f1(anomalous, hit, false):
    rng = np.random.default_rng(1)
    both = anomalous * hit
    true = 2 * both / (both + anomalous + (1 - anomalous) * false)
    intervals = [f1_interval(*f1_data(rng, 80, anomalous, hit, false)) for _ in range(400)]
    assert np.mean([low <= true <= high for low, high in intervals]) >= 0.93


def test_intervals_contain_their_metrics_and_are_within_0_and_1():
    rng = np.random.default_rng(0)
    for hit in (0, 0.3, 0.9, 1):
        for _ in range(10):
            predictions, labels = f1_data(rng, 12, 0.4, hit, 0.2)
            low, high = f1_interval(predictions, labels)
            assert 0 <= low <= compute_f1(predictions, labels) <= high <= 1
    rng = np.random.default_rng(5)
    for distance in (-4, -1, 0, 1, 4):
        for count in (2, 3, 10):
            scores, labels = binormal(rng, count, 3, distance, ties=True)
            low, high = auroc_interval(scores, labels)
            assert 0 <= low <= compute_auroc(scores, labels) <= high <= 1
            assert high - low > 0.05


def binormal(rng, num_normal, num_anomalous, distance, ties=False):
    """Scores whose true AUROC is `area_of(distance)`, and labels."""
    labels = np.repeat([0, 1], [num_normal, num_anomalous])
    scores = rng.normal(size=len(labels)) + distance * labels
    return (scores.round() if ties else scores), labels


def area_of(distance):
    return stats.norm.cdf(distance / np.sqrt(2))


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


def around(area, variance):
    """The 95 % interval of an area with that variance, on the logit scale."""
    half = Z * np.sqrt(variance) / (area * (1 - area))
    return pytest.approx(expit([logit(area) - half, logit(area) + half]))


def test_auroc_interval_by_hand():
    # Each anomalous image is above 1/2 and 1 of the normal ones, each normal one below 1 and 1/2
    # of the anomalous ones: variances 1/8, of two images each.
    assert auroc_interval(SCORES, LABELS) == around(3 / 4, 1 / 8 / 2 + 1 / 8 / 2)
    # A single anomalous image has the largest variance, 2/3 (1 - 2/3); the normal ones have 1/9.
    assert auroc_interval([1, 2, 9, 4], [0, 0, 0, 1]) == around(2 / 3, 2 / 9 + 1 / 9)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("num_normal", "num_anomalous"), [(10, 15), (30, 17), (40, 40)])
def test_auroc_interval_is_that_of_all_pairs(num_normal, num_anomalous, ties):
    scores, labels = binormal(np.random.default_rng(3), num_normal, num_anomalous, 0.7, ties)
    (area,), ((variance,),) = brute_force(labels, scores)
    assert auroc_interval(scores, labels) == around(area, variance)
    assert compute_auroc(scores, labels) == pytest.approx(area)


# Numbers of images and the distance; the first case of each kind is quick.
ENOUGH = [(40, 40, 1.5), (40, 40, 0.5), (100, 20, 1.5), (20, 100, 1.0), (30, 30, 2.5)]
FEW = [(n, m, x) for n, m in ((200, 2), (40, 2), (40, 3), (5, 40)) for x in (0.5, 0.0, 1.0)]
SINGLE = [(60, 1, 1.5), (60, 1, 0.5), (60, 1, 2.5)]


@pytest.mark.parametrize(
    ("case", "num_repetitions", "least", "most"),
    [
        pytest.param(case, *limits, marks=[pytest.mark.exhaustive] if case != cases[0] else [])
        for cases, limits in (
            (ENOUGH, (400, 0.92, 0.985)),
            (FEW, (400, 0.9, 1)),
            (SINGLE, (150, 0.95, 1)),
        )
        for case in cases
    ],
)
def test_auroc_interval_holds_the_true_auroc(case, num_repetitions, least, most):
    rng = np.random.default_rng(4)
    true = area_of(case[-1])
    intervals = [auroc_interval(*binormal(rng, *case)) for _ in range(num_repetitions)]
    assert least <= np.mean([low <= true <= high for low, high in intervals]) <= most


def test_auroc_interval_of_few_images_is_at_least_that_of_hanley_and_mcneil():
    # Both anomalous images are above 2 of 3 normal ones, so that DeLong's variance of them is 0,
    # and the normal ones' is that of 0, 0 and 1 by 3, 1/9. Area 2/3: Q1 = 1/2, Q2 = 8/15, and
    # (2/9 + (1/2 - 4/9) + 2 (8/15 - 4/9)) / 6 = 41/540, which is less than 1/9.
    labels, scores = np.array([0, 0, 0, 1, 1]), np.array([1.0, 2.0, 9.0, 4.0, 5.0])
    assert auroc_interval(scores, labels) == around(2 / 3, 1 / 9)
    # With four times as many normal images of the same shares DeLong's is 2/99, and the other one
    # (2/9 + (1/2 - 4/9) + 11 (8/15 - 4/9)) / 24 = 113/2160.
    labels, scores = np.r_[np.zeros(12, int), 1, 1], np.r_[np.ones(8), 9 * np.ones(4), 4.0, 5.0]
    assert auroc_interval(scores, labels) == around(2 / 3, 113 / 2160)


def test_one_image_of_a_class_and_equal_scores_say_little():
    labels = np.repeat([0, 1], [100, 1])
    low, high = auroc_interval(np.r_[np.arange(100), 94.5], labels)
    assert low < 0.5 < 0.95 < high
    low, high = auroc_interval(np.ones(10), np.repeat([0, 1], 5))
    assert low < 0.5 < high
    assert high - low > 0.7


@pytest.mark.parametrize(("num_normal", "num_anomalous"), [(10, 4), (4, 10), (1, 1)])
def test_separated_classes_have_the_interval_of_the_smaller_ones_share(num_normal, num_anomalous):
    smaller = min(num_normal, num_anomalous)
    labels = np.repeat([0, 1], [num_normal, num_anomalous])
    assert auroc_interval(labels, labels) == pytest.approx((0.025 ** (1 / smaller), 1))
    assert auroc_interval(-labels, labels) == pytest.approx((0, 1 - 0.025 ** (1 / smaller)))


def test_auroc_interval_depends_on_the_order_alone():
    scores, labels = binormal(np.random.default_rng(6), 30, 20, 1)
    low, high = auroc_interval(scores, labels)
    assert auroc_interval(np.exp(scores[::-1]), labels[::-1]) == pytest.approx((low, high))
    assert auroc_interval(scores, 1 - labels) == pytest.approx((1 - high, 1 - low))


def test_intervals_are_wider_at_higher_confidence():
    scores, labels = binormal(np.random.default_rng(7), 30, 20, 1)
    for interval in (
        lambda confidence: auroc_interval(scores, labels, confidence),
        lambda confidence: f1_interval(scores > 0.5, labels, confidence),
        lambda confidence: share_interval(3, 10, confidence),
        lambda confidence: auroc_difference(scores, scores**2, labels, confidence)[1],
    ):
        (low, high), (lower, higher) = interval(0.8), interval(0.99)
        assert lower < low < high < higher


def test_auroc_difference_by_hand():
    # The other scores are the first ones' negatives: AUROC 3/4 and 1/4, covariance -1/8.
    half = Z * np.sqrt(1 / 8 + 1 / 8 + 2 / 8)
    difference, interval = auroc_difference(SCORES, -np.array(SCORES), LABELS)
    assert difference == pytest.approx(0.5)
    assert interval == pytest.approx((0.5 - half, min(0.5 + half, 1)))


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_difference_is_that_of_all_pairs_and_antisymmetric(ties):
    rng = np.random.default_rng(8)
    scores, labels = binormal(rng, 25, 15, 1, ties)
    other = scores + rng.normal(size=40)
    (one, another), covariance = brute_force(labels, scores, other)
    expected, half = one - another, Z * np.sqrt([1, -1] @ covariance @ [1, -1])
    difference, interval = auroc_difference(scores, other, labels)
    assert difference == pytest.approx(expected)
    assert interval == pytest.approx((expected - half, expected + half))
    difference, interval = auroc_difference(other, scores, labels)
    assert difference == pytest.approx(-expected)
    assert interval == pytest.approx((-expected - half, -expected + half))


def test_the_same_order_does_not_differ_but_two_perfect_orders_may():
    scores, labels = binormal(np.random.default_rng(9), 30, 20, 1)
    assert auroc_difference(scores, 2 * scores + 1, labels) == (0, pytest.approx((0, 0), abs=1e-7))
    labels, scores = np.array([0, 0, 0, 1, 1, 1]), np.array([1, 2, 3, 4, 5, 6.0])
    width = 1 - share_interval(3, 3)[0]
    difference, interval = auroc_difference(scores, [3, 2, 1, 6, 5, 4], labels)
    assert (difference, *interval) == pytest.approx((0, -width, width))
    difference, interval = auroc_difference(scores, -scores, labels)
    assert (difference, *interval) == pytest.approx((1, 1 - width, 1))


def test_correlated_scores_have_a_narrower_difference_than_independent_ones():
    rng = np.random.default_rng(11)
    scores, labels = binormal(rng, 60, 60, 1)
    independent, _ = binormal(rng, 60, 60, 1)
    narrow, wide = (
        np.ptp(auroc_difference(scores, other, labels)[1])
        for other in (scores + 0.1 * rng.normal(size=120), independent)
    )
    assert narrow < 0.4 * wide


def test_auroc_difference_holds_the_true_difference():
    rng = np.random.default_rng(12)
    true = area_of(1.5) - area_of(1.5 / np.sqrt(2))
    held = []
    for _ in range(400):
        scores, labels = binormal(rng, 40, 40, 1.5)
        low, high = auroc_difference(scores, scores + rng.normal(size=80), labels)[1]
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
