"""Figures of labels, scores and maps: pure functions of arrays. `visualization` draws them."""

from anomaly_detection.metrics.image import (
    compute_auroc,
    compute_auroc_per_class,
    compute_average_precision,
    compute_f1,
    compute_f1_max,
)
from anomaly_detection.metrics.intervals import (
    auroc_difference,
    auroc_interval,
    f1_interval,
    mcnemar_p_value,
    share_interval,
)
from anomaly_detection.metrics.pixel import PixelHistogram

__all__ = [
    "PixelHistogram",
    "auroc_difference",
    "auroc_interval",
    "compute_auroc",
    "compute_auroc_per_class",
    "compute_average_precision",
    "compute_f1",
    "compute_f1_max",
    "f1_interval",
    "mcnemar_p_value",
    "share_interval",
]
