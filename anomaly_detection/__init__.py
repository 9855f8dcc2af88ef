"""Anomaly detection from good images only: data, models, training, evaluation and metrics."""
