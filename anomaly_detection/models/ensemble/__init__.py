"""Several models as one: the mean of their standardised maps."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"model": ["EnsembleModel"]}
)
