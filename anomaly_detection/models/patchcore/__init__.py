"""PatchCore, a memory bank of normal patches (Roth et al., CVPR 2022, arXiv:2106.08265)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "coreset": ["Reservoir", "far_apart", "farthest_points", "first_round", "project"],
        "model": ["PatchCoreModel", "image_names", "join_levels", "nearest", "nearest_distances"],
    },
)
