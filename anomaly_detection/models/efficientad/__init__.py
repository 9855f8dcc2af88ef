"""EfficientAD: a student and an autoencoder against a teacher (Batzner et al., WACV 2024)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "losses": ["autoencoder_losses", "hard_feature_loss"],
        "model": ["EfficientADModel"],
        "networks": ["Autoencoder", "patch_description_network"],
        "trainer": ["EfficientADTrainer"],
    },
)
