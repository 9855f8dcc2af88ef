"""Gaussian distributions of a backbone's features at each position (PaDiM, arXiv:2011.08785)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"model": ["Gaussian", "GaussianModel"]}
)
