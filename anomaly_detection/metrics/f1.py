"""F1 of verdicts, and the best that scores allow."""

import numpy as np
from numpy.typing import ArrayLike

from anomaly_detection.metrics.auroc import check_scores_and_labels


def compute_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Harmonic mean of precision and recall; predictions are 0 or 1.

    Raises:
        ValueError: As in `check_scores_and_labels`.
    """
    from sklearn.metrics import f1_score

    predictions, labels = check_scores_and_labels(predictions, labels)
    return float(f1_score(labels, predictions))


def compute_f1_max(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """The best F1 that any threshold reaches on these scores, an upper bound, and that threshold.

    An image is anomalous if `score > threshold`; the threshold lies halfway between two scores.

    Raises:
        ValueError: As in `check_scores_and_labels`.
    """
    from sklearn.metrics import precision_recall_curve

    scores, labels = check_scores_and_labels(scores, labels)
    precision, recall, cuts = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = int(np.argmax(f1[:-1]))
    below = cuts[best - 1] if best else np.nextafter(np.float32(cuts[0]), np.float32(-np.inf))
    halfway = np.float32((cuts[best] + below) / 2)
    return float(f1[best]), float(halfway if below <= halfway < cuts[best] else below)
