"""Metrics of scores, labels and maps: pure functions of arrays, scores first.

Plots of them can be imported from here too; they are looked up on demand, so that metrics import no
matplotlib.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "auroc": ["compute_auroc", "compute_auroc_per_class", "compute_average_precision"],
        "f1": ["compute_f1", "compute_f1_max"],
        "intervals": [
            "auroc_difference",
            "auroc_interval",
            "f1_interval",
            "mcnemar_p_value",
            "share_interval",
        ],
        "pixel": ["PixelHistogram"],
        "visualization": [
            "plot_confusion_matrix",
            "plot_precision_recall_curve",
            "plot_roc_curve",
            "plot_score_histogram",
        ],
    },
)
