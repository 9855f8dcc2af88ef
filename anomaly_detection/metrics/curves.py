"""Curves over all thresholds, as rows of numbers."""

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import precision_recall_curve, roc_curve

from anomaly_detection.metrics.auroc import check_scores_and_labels
from anomaly_detection.metrics.intervals import share_interval


def roc(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Rows of false-reject rate, detection rate and the latter's exact 95 % interval, (K, 4).

    The interval is pointwise, not simultaneous.

    Raises:
        ValueError: As in `check_scores_and_labels`.
    """
    scores, labels = check_scores_and_labels(scores, labels)
    false_rejects, detected, _ = roc_curve(labels, scores)
    total = int(labels.sum())
    intervals = [share_interval(round(rate * total), total) for rate in detected]
    return np.column_stack([false_rejects, detected, intervals])


def precision_recall(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Rows of recall and precision, (K, 2).

    Raises:
        ValueError: As in `check_scores_and_labels`.
    """
    scores, labels = check_scores_and_labels(scores, labels)
    precision, recall, _ = precision_recall_curve(labels, scores)
    return np.column_stack([recall, precision])
