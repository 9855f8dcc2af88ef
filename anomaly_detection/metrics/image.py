"""Metrics of one score per image. Labels are 0 for normal and 1 for anomalous, shape (N,).

Scores may have any range: all metrics but F1 depend on their order alone. scikit-learn takes a
second to import, so it is imported only where it is needed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def check_labels_and_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of shape (N,): labels 0 and 1, at least one of each, and finite scores.

    Raises:
        ValueError: The shapes differ, a score is not finite, or there is only one class.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"labels and scores must have the same shape (N,), got {labels.shape} and "
            f"{scores.shape}."
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {(~np.isfinite(scores)).sum()} that are not.")
    if set(np.unique(labels)) != {0, 1}:
        raise ValueError(
            f"labels must have both classes, 0 and 1, got only {np.unique(labels).tolist()}."
        )
    return labels.astype(int), scores


def compute_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: how often an anomalous image scores above a normal one.

    Raises:
        ValueError: There is only one class, or the arrays do not match.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*check_labels_and_scores(labels, scores)))


def compute_auroc_per_class(
    labels: ArrayLike, scores: ArrayLike, classes: Sequence[str]
) -> dict[str, float]:
    """AUROC of each class (defect type) of anomalous images against all normal ones.

    For your own scores; in the pipeline, `evaluation.image_metrics` reports the same values under
    `per_defect_type`, with intervals.

    Args:
        labels: Shape (N,).
        scores: Shape (N,).
        classes: The class of each image, N names; those of normal images are ignored.

    Raises:
        ValueError: There is only one label, or the arrays do not match.
    """
    labels, scores = check_labels_and_scores(labels, scores)
    names = np.asarray(classes)
    if names.shape != labels.shape:
        raise ValueError(f"classes must have shape {labels.shape}, got {names.shape}.")
    return {
        str(name): compute_auroc(labels[chosen], scores[chosen])
        for name in np.unique(names[labels == 1])
        for chosen in [(labels == 0) | (names == name)]
    }


def compute_average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the precision-recall curve, summed over its steps.

    Raises:
        ValueError: There is only one class, or the arrays do not match.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*check_labels_and_scores(labels, scores)))


def compute_f1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Harmonic mean of precision and recall; predictions are 0 or 1.

    Raises:
        ValueError: There is only one class, or the arrays do not match.
    """
    from sklearn.metrics import f1_score

    return float(f1_score(*check_labels_and_scores(labels, predictions)))


def compute_f1_max(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """The best F1 that any threshold reaches on these scores, an upper bound, and that threshold.

    An image is anomalous if `score > threshold`; the threshold lies halfway between two scores.

    Raises:
        ValueError: There is only one class, or the arrays do not match.
    """
    from sklearn.metrics import precision_recall_curve

    labels, scores = check_labels_and_scores(labels, scores)
    precision, recall, cuts = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = int(np.argmax(f1[:-1]))
    below = cuts[best - 1] if best else np.nextafter(np.float32(cuts[0]), np.float32(-np.inf))
    halfway = np.float32((cuts[best] + below) / 2)
    return float(f1[best]), float(halfway if below <= halfway < cuts[best] else below)
