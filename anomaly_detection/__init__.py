"""Anomaly detectors from normal images only: fitted, calibrated and deployed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"inference": ["Detector", "Prediction"]}
)
