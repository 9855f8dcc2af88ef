"""EfficientAD's losses (Batzner et al., WACV 2024, arXiv:2303.14535, sections 3.2 and 3.3)."""

import math

from torch import Tensor

HARD_QUANTILE = 0.999


def hard_feature_loss(teacher: Tensor, student: Tensor, quantile: float = HARD_QUANTILE) -> Tensor:
    """The mean of the largest squared differences (section 3.2, L_hard).

    Args:
        teacher: Features (N, C, H, W).
        student: The student's, of the same shape.
        quantile: Those from this quantile of an image's differences on count; 0 is their mean.

    Returns:
        The loss of each image, (N,).
    """
    differences = (teacher - student).square().flatten(1)
    count = differences.shape[1] - math.ceil(quantile * (differences.shape[1] - 1))
    return differences.topk(count, sorted=False).values.mean(dim=1)


def mean_square(features: Tensor) -> Tensor:
    """The mean of squared features, a scalar.

    Of differences, it is the loss of the autoencoder and of the student that learns its errors
    (section 3.3, L_AE and L_STAE); of the student's features of images that do not show the
    product, it is the penalty (section 3.2, the second term of L_ST).
    """
    return features.square().mean()
