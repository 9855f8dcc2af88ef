"""Detectors for other runtimes, and the proof that they give the same verdicts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "formats": ["FORMATS", "SUBSET", "export_detector"],
        "parity": ["ParityError", "close_calls", "measure_parity", "refuse_changes"],
    },
)
