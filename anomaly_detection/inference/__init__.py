"""Verdicts on new images, by a detector that is one file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"detector": ["Detector", "DetectorError", "Prediction", "save_detector"]},
)
