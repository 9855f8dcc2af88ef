"""How well scores rank images. Labels are 0 for normal and 1 for anomalous, shape (N,).

Scores come first, and may have any range: their order alone counts. scikit-learn takes a second to
import, so it is imported only where it is needed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def check_scores_and_labels(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of shape (N,): finite scores, and labels 0 and 1, at least one of each.

    Raises:
        ValueError: The shapes differ, a score is not finite, a label is neither 0 nor 1, as of
            arguments in the other order, or there is only one class.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"scores and labels must have the same shape (N,), got {scores.shape} and "
            f"{labels.shape}."
        )
    found = np.unique(labels)
    if not np.isin(found, (0, 1)).all():
        swapped = np.isin(scores, (0, 1)).all()
        fix = "; scores come first, then labels" if swapped else ""
        raise ValueError(f"labels must be 0 or 1, got {found[~np.isin(found, (0, 1))][0]}{fix}.")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {(~np.isfinite(scores)).sum()} that are not.")
    if len(found) < 2:
        raise ValueError(
            f"labels must have both classes, 0 and 1, got only {found.astype(int).tolist()}."
        )
    return scores, labels.astype(int)


def compute_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: how often an anomalous image scores above a normal one.

    Raises:
        ValueError: As in `check_scores_and_labels`.
    """
    from sklearn.metrics import roc_auc_score

    scores, labels = check_scores_and_labels(scores, labels)
    return float(roc_auc_score(labels, scores))


def compute_auroc_per_class(
    scores: ArrayLike, labels: ArrayLike, class_names: Sequence[str]
) -> dict[str, float]:
    """AUROC of each class (defect type) of anomalous images against all normal ones.

    For your own scores; in the pipeline, `evaluator.image_metrics` reports the same values under
    `per_defect_type`, with intervals.

    Args:
        scores: Shape (N,).
        labels: Shape (N,).
        class_names: The class of each image, N names; those of normal images are ignored.

    Raises:
        ValueError: As in `check_scores_and_labels`, or there is not a name for each image.
    """
    scores, labels = check_scores_and_labels(scores, labels)
    names = np.asarray(class_names)
    if names.shape != labels.shape:
        raise ValueError(f"class_names must have shape {labels.shape}, got {names.shape}.")
    return {
        str(name): compute_auroc(scores[chosen], labels[chosen])
        for name in np.unique(names[labels == 1])
        for chosen in [(labels == 0) | (names == name)]
    }


def compute_average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the precision-recall curve, summed over its steps.

    Raises:
        ValueError: As in `check_scores_and_labels`.
    """
    from sklearn.metrics import average_precision_score

    scores, labels = check_scores_and_labels(scores, labels)
    return float(average_precision_score(labels, scores))
