"""Kept for code that imports from here: see `anomaly_detection.evaluation`."""

from anomaly_detection.evaluation.run import evaluate

__all__ = ["evaluate"]
