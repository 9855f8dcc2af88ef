"""Verdicts on new images, from a single-file detector."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"detector": ["Detector", "DetectorError", "Prediction", "save_detector"]},
)
