"""Evaluate a detector: inference, thresholds, metrics on real and on synthetic defects."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "detectability": ["detection_by_size", "evaluate_synthetic", "size_detected"],
        "prepared": ["evaluate_prepared"],
        "synthetic": ["every_defect", "one_defect_each", "synthetic_batches"],
        "thresholds": ["ThresholdError", "choose_threshold", "false_reject_threshold"],
    },
)
