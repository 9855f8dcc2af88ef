import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from anomaly_detection import metrics
from anomaly_detection.metrics import (
    compute_auroc,
    compute_auroc_per_class,
    compute_average_precision,
    compute_f1,
    compute_f1_max,
)
from anomaly_detection.report import plots

RANKED = [compute_auroc, compute_average_precision, lambda y, s: compute_f1_max(y, s)[0]]
ALL = [*RANKED, compute_f1]


def random_case(seed, size=200, levels=None):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % 3 == 0).astype(int)
    scores = rng.normal(size=size) + labels
    return labels, scores if levels is None else np.round(scores * levels) / levels


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


def test_random_scores_have_auroc_one_half():
    rng = np.random.default_rng(0)
    labels = np.arange(20_000) % 2
    assert compute_auroc(rng.random(20_000), labels) == pytest.approx(0.5, abs=0.015)


def test_average_precision_by_hand():
    # From the highest score down: hit (1/1), miss, hit (2/3); each hit is half of the recall.
    labels, scores = [1, 0, 1, 0], [4, 3, 2, 1]
    assert compute_average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)


def test_f1_by_hand():
    # 2 true positives, 1 false positive, 1 miss: 2 * 2 / (2 * 2 + 1 + 1).
    assert compute_f1([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx(2 / 3)


def test_f1_is_zero_if_nothing_is_called_anomalous():
    assert compute_f1([0, 1, 1], [0, 0, 0]) == 0


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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [None, 2])
def test_metrics_equal_scikit_learn_and_brute_force(seed, levels):
    labels, scores = random_case(seed, levels=levels)
    best, threshold = compute_f1_max(scores, labels)
    assert compute_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert compute_average_precision(scores, labels) == pytest.approx(
        average_precision_score(labels, scores)
    )
    cuts = [-np.inf, *np.unique(scores)]
    assert best == pytest.approx(max(f1_score(labels, scores > cut) for cut in cuts))
    assert compute_f1(labels, scores > threshold) == pytest.approx(best)


@pytest.mark.parametrize("low", [np.float32(1 + 2**-23), 1 + 2**-52])
def test_best_threshold_separates_scores_that_are_neighbouring_floats(low):
    scores = np.array([low, np.nextafter(low, low + 1)])
    best, threshold = compute_f1_max([0, 1], scores)
    assert best == 1
    assert (scores > threshold).tolist() == [False, True]


@pytest.mark.parametrize("metric", RANKED)
@pytest.mark.parametrize("change", [np.exp, lambda s: 1000 * s - 5, lambda s: s**3])
def test_metrics_depend_on_the_order_of_the_scores_only(metric, change):
    labels, scores = random_case(0)
    assert metric(labels, change(scores)) == pytest.approx(metric(labels, scores))


@pytest.mark.parametrize("metric", ALL)
def test_metrics_do_not_depend_on_the_order_of_the_images(metric):
    labels, scores = random_case(1)
    scores = (scores > 0.5).astype(int) if metric is compute_f1 else scores
    order = np.random.default_rng(0).permutation(len(labels))
    assert metric(labels[order], scores[order]) == pytest.approx(metric(labels, scores))


def test_auroc_per_class_takes_all_normal_images_and_one_class_by_hand():
    labels = [0, 0, 1, 1, 1]
    scores = [1, 3, 2, 4, 5]
    classes = ["good", "good", "hole", "hole", "crack"]
    # hole: 2 > 1, 4 > 1, 4 > 3 of 4 pairs; crack: both pairs.
    assert compute_auroc_per_class(labels, scores, classes) == {"crack": 1.0, "hole": 0.75}


def test_auroc_per_class_ignores_the_classes_of_normal_images():
    labels, scores = [0, 0, 1], [1, 3, 2]
    assert compute_auroc_per_class(labels, scores, ["hole", "", "hole"]) == {"hole": 0.5}


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0], [1, 2], r"both classes, 0 and 1, got only \[0\]"),
        ([1, 1], [1, 2], r"both classes, 0 and 1, got only \[1\]"),
        ([], [], r"both classes, 0 and 1, got only \[\]"),
        ([0, 1, 2], [1, 2, 3], r"0 and 1, got only \[0, 1, 2\]"),
        ([0, 1], [1, 2, 3], r"same shape \(N,\), got \(2,\) and \(3,\)"),
        ([[0], [1]], [[1], [2]], r"same shape \(N,\), got \(2, 1\) and \(2, 1\)"),
        ([0, 1, 1], [1, np.nan, np.inf], "scores must be finite, got 2 that are not"),
    ],
)
def test_images_that_define_no_metric_are_an_error(metric, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metric(labels, scores)


def test_auroc_per_class_needs_a_class_for_each_image():
    with pytest.raises(ValueError, match=r"classes must have shape \(2,\), got \(3,\)"):
        compute_auroc_per_class([0, 1], [1, 2], ["good", "hole", "hole"])


@pytest.mark.parametrize("name", metrics.PLOTS)
def test_plots_of_metrics_can_be_imported_from_metrics(name):
    assert getattr(metrics, name) is getattr(plots, name)


def test_metrics_load_no_matplotlib_until_a_plot_is_asked_for():
    code = (
        "import sys; from anomaly_detection import metrics; print('matplotlib' in sys.modules);"
        "metrics.plot_roc_curve; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_metrics_have_no_other_names_than_theirs():
    with pytest.raises(AttributeError, match=r"metrics' has no attribute 'plot_nothing'"):
        metrics.plot_nothing  # noqa: B018, the lookup is what is tested
