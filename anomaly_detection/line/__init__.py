"""Beside the conveyor: judge what comes in for months, and notice when the parts have changed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"drift": ["Drift", "DriftMonitor"]}
)
