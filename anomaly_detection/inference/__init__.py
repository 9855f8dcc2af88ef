"""Verdicts on new images, from a detector's file or from an exported one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "detector": ["Detector", "Prediction", "p_value"],
        "pytorch": ["VerdictModel", "encoded_example", "save_detector"],
        "runtimes": ["DetectorError"],
        "statistics": ["Statistics", "statistics_of_images"],
    },
)
