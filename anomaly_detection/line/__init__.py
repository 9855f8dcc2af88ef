"""Beside the conveyor: what comes in for months, and whether the parts have changed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"drift": ["Drift", "DriftMonitor"]}
)
