"""Metrics of labels, scores and maps: pure functions of arrays. `report.plots` draws them.

The plots of metrics can be imported from here too. They are looked up on demand, so that metrics
import no matplotlib and do not depend on the report.
"""

import importlib
from typing import Any

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

PLOTS = (
    "plot_confusion_matrix",
    "plot_precision_recall_curve",
    "plot_roc_curve",
    "plot_score_histogram",
)


def __getattr__(name: str) -> Any:
    if name not in PLOTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("anomaly_detection.report.plots"), name)
