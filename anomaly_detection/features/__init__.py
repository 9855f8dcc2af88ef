"""Features of pretrained backbones: pyramids of levels, their weights, and a cache on disk."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cache": ["FeatureCache"],
        "config": ["PyramidParameters"],
        "pyramid": ["FeaturePyramid", "available_levels", "check_backbone"],
        "weights": ["BUNDLED", "BackboneError"],
    },
)
