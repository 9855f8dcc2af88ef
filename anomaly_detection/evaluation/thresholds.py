"""Thresholds for `score > threshold`, from scores of normal images that training has not seen."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from anomaly_detection.data.calibration import images_needed, round_up, too_few
from anomaly_detection.errors import UserError
from anomaly_detection.metrics import compute_f1_max

RATES = (0.02, 0.05, 0.1, 0.2, 0.3)  # false-reject rates that people compare


class ThresholdError(UserError):
    """The calibration scores do not support the requested threshold."""


def choose_threshold(
    method: str,
    scores: ArrayLike,
    *,
    false_reject_rate: float,
    quantile: float,
    manual: float,
    synthetic_scores: Callable[[], ArrayLike],
) -> float:
    """The threshold by one of four methods, from calibration images alone.

    Args:
        method: `false_reject_rate`, `quantile`, `adaptive` or `manual`.
        scores: Scores of the calibration images, shape (n,).
        false_reject_rate: As in `false_reject_threshold`.
        quantile: As in `quantile_threshold`.
        manual: The threshold itself.
        synthetic_scores: Returns the scores of the same images with synthetic defects.

    Raises:
        ThresholdError: The scores do not support it.
    """
    if method == "manual":
        return manual
    if method == "quantile":
        return quantile_threshold(scores, quantile)
    if method == "adaptive":
        return adaptive_threshold(scores, synthetic_scores())
    return false_reject_threshold(scores, false_reject_rate)


def false_reject_threshold(scores: ArrayLike, rate: float) -> float:
    """The smallest threshold expected to reject at most a share `rate` of normal images.

    Split conformal prediction: each of n + 1 exchangeable scores is equally likely to be the new
    one, so the threshold is the ceil((n + 1) (1 - rate))-th smallest of n (Vovk et al., 2005).

    Args:
        scores: Scores of n normal images, shape (n,).
        rate: In (0, 1).

    Raises:
        ThresholdError: n is less than 1 / rate - 1, or a score is not finite.
    """
    scores = _sorted(scores)
    if fault := too_few(rate, len(scores)):
        raise ThresholdError(
            f"{fault}; add normal images, set the rate to {round_up(1 / (len(scores) + 1), 3)}, "
            "or, if evaluation.calibration is split, set it to cross or raise "
            "data.calibration_fraction."
        )
    allowed_above = math.floor((len(scores) + 1) * rate + 1e-9)
    return float(scores[len(scores) - allowed_above])


def thresholds_by_rate(scores: ArrayLike) -> list[dict[str, Any]]:
    """For each of RATES its `rate`, and the `threshold` of `false_reject_threshold`.

    Where there are too few scores, `threshold` is None, and `images_needed` says how many would do.
    """
    scores, rows = _sorted(scores), []
    for rate in RATES:
        enough = len(scores) >= images_needed(rate)
        threshold = false_reject_threshold(scores, rate) if enough else None
        rows.append({"rate": rate, "threshold": threshold, "images_needed": images_needed(rate)})
    return rows


def quantile_threshold(scores: ArrayLike, quantile: float) -> float:
    """The smallest score that at least a share `quantile` of the scores does not exceed.

    Raises:
        ThresholdError: There are no scores, or one is not finite.
    """
    return float(np.quantile(_sorted(scores), quantile - 1e-12, method="inverted_cdf"))


def false_reject_bounds(scores: ArrayLike, threshold: float) -> dict[str, float]:
    """Bounds on the share of normal images that a threshold rejects, from calibration scores.

    With x of n scores above the threshold, the share follows Beta(x + 1, n - x).

    Returns:
        `expected`, its mean over all calibration sets, (x + 1) / (n + 1), and `upper_95`, which it
        exceeds for one calibration set in twenty.
    """
    scores = _sorted(scores)
    above = int((scores > threshold).sum())
    within = len(scores) - above
    upper = float(scipy.stats.beta.ppf(0.95, above + 1, within)) if within else 1.0
    return {"expected": (above + 1) / (len(scores) + 1), "upper_95": upper}


def adaptive_threshold(normal_scores: ArrayLike, anomalous_scores: ArrayLike) -> float:
    """The threshold with the best F1 between normal images and synthetic defects on them.

    Raises:
        ThresholdError: There are no scores, or one is not finite.
    """
    normal_scores, anomalous_scores = _sorted(normal_scores), _sorted(anomalous_scores)
    labels = np.repeat([0, 1], [len(normal_scores), len(anomalous_scores)])
    return compute_f1_max(np.concatenate([normal_scores, anomalous_scores]), labels)[1]


def _sorted(scores: ArrayLike) -> np.ndarray:
    scores = np.sort(np.asarray(scores, dtype=np.float64))
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ThresholdError(
            f"calibration scores must be finite and of shape (n,), n > 0, got {scores.shape}."
        )
    return scores
