"""The Gaussian model: the distribution at a position, its distances, the choice of channels."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from builders.models import (
    assert_same_tensors,
    batches,
    build,
    context,
    generator,
    random_images,
)
from pydantic import ValidationError
from scipy.spatial.distance import mahalanobis
from scipy.stats import chisquare
from torch import nn

from anomaly_detection.features.moments import Moments
from anomaly_detection.models import restore, snapshot, spec
from anomaly_detection.models.files import InPrecision
from anomaly_detection.models.gaussian import Gaussian, GaussianModel
from anomaly_detection.models.gaussian.config import Parameters
from anomaly_detection.models.gaussian.model import REGULARISATION
from anomaly_detection.trainer import TrainingError

SPEC = spec("gaussian")
BACKBONE = "test_efficientnet"  # timm's smallest
CROSS = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]]).view(4, 2, 1, 1)


def moments_of(features):
    moments = Moments()
    moments.add(features)
    return moments


def gaussian_of(features, shrinkage=0.2):
    """The distribution of features (N, C, H, W)."""
    channels = features.shape[1]
    gaussian = Gaussian(features[0, 0].numel(), channels, channels, shrinkage == 1)
    gaussian.estimate(moments_of(features), shrinkage)
    return gaussian


def random_features(count, channels=3, seed=0):
    """Maps of 2 x 4 positions whose channels are correlated, with scales that vary by position."""
    maps = torch.randn(count, channels, 2, 4, generator=generator(seed))
    return maps.cumsum(dim=1) * torch.arange(1.0, 9.0).view(2, 4) + 5


def covariances(features, shrinkage):
    """Covariances (P, C, C) by NumPy: shrunk, and with their regularisation."""
    vectors = features.double().flatten(2).permute(2, 0, 1).numpy()
    own = np.stack([np.cov(x.T) for x in vectors])
    shared = own.mean(axis=0)
    added = REGULARISATION * np.diagonal(shared).mean() * np.eye(len(shared))
    return (1 - shrinkage) * own + shrinkage * shared + added


# The distribution


@pytest.mark.parametrize(
    ("x", "y", "square"),
    [
        # Variances 16 / 3 and 4 / 3; a hundredth of their mean, 1 / 30, is added to both.
        (0, 0, 0),
        (1, 0, 30 / 161),
        (0, 1, 30 / 41),
        (2, -3, 4 * 30 / 161 + 9 * 30 / 41),
    ],
)
def test_squared_distance_by_hand_is_that_of_mahalanobis_per_channel(x, y, square):
    distance = gaussian_of(CROSS + 10)(torch.tensor([10.0 + x, 10 + y]).view(1, 2, 1, 1))
    assert distance.shape == (1, 1, 1)
    assert distance.item() == pytest.approx((square / 2) ** 0.5, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    ("count", "channels", "factor"), [(20, 3, 1.0), (20, 3, 1e-4), (5, 8, 1000.0), (2, 4, 1.0)]
)
def test_distance_is_scipys_at_each_position(shrinkage, count, channels, factor):
    """Also where there are fewer images than channels, and with features of any scale.

    With full shrinkage, one matrix is kept for all positions.
    """
    features = factor * random_features(count, channels)
    new = factor * random_features(3, channels, seed=1)
    gaussian = gaussian_of(features, shrinkage)
    assert gaussian.whitening.shape == (1 if shrinkage == 1 else 8, channels, channels)
    distances = gaussian(new)
    assert distances.shape == (3, 2, 4)
    inverses = np.linalg.inv(covariances(features, shrinkage)).reshape(2, 4, channels, channels)
    means = features.double().mean(dim=0).numpy()
    for image, row, column in np.ndindex(3, 2, 4):
        vector = new[image, :, row, column].double().numpy()
        expected = mahalanobis(vector, means[:, row, column], inverses[row, column])
        found = distances[image, row, column].item() * channels**0.5
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1.0])
def test_constant_features_give_finite_distances(shrinkage):
    """All of them, as of images of one colour; or those of one channel, as of a dead one."""
    constant = torch.full((5, 3, 2, 4), 0.1)
    distances = gaussian_of(constant, shrinkage)(constant)
    assert distances.isfinite().all()
    assert distances.max() < 0.1
    assert gaussian_of(constant, shrinkage)(constant + 1).isfinite().all()
    dead = random_features(5)
    dead[:, 1] = 0.1
    assert gaussian_of(dead, shrinkage)(dead).isfinite().all()
    assert gaussian_of(dead, shrinkage)(dead).max() < 5


def test_fewer_than_two_images_are_refused():
    for count, moments in enumerate((Moments(), moments_of(random_features(1)))):
        with pytest.raises(TrainingError, match=rf"at least two images, got {count}\.$"):
            Gaussian(8, 3, 3, False).estimate(moments, 0.2)
    for count, loader in enumerate(([], batches(random_images(1)))):
        with pytest.raises(TrainingError, match=f"at least two images, got {count}"):
            fit(loader)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value):
    features = random_features(4)
    features[2, 1, 0, 3] = value
    with pytest.raises(TrainingError, match=r"^features must be finite.*to float32\.$"):
        gaussian_of(features)


# The choice of channels


def test_channels_are_chosen_at_random_and_kept_in_their_order():
    gaussian, draws, chance = Gaussian(0, 5, 2, False), Counter(), generator()
    for _ in range(1000):
        gaussian.choose_channels(chance)
        draws[tuple(gaussian.channels.tolist())] += 1
    assert set(draws) == set(combinations(range(5), 2))
    assert chisquare(list(draws.values())).pvalue > 0.01


def test_chosen_channels_are_those_of_the_features():
    gaussian = Gaussian(1, 5, 2, False)
    gaussian.channels.copy_(torch.tensor([1, 4]))
    features = torch.arange(5.0).view(1, 5, 1, 1)
    assert gaussian.select(features).flatten().tolist() == [1, 4]
    assert gaussian_of(features.repeat(2, 1, 1, 1)).select(features) is features


# The model


def parameters(**changes):
    return Parameters(**{"backbone": BACKBONE, "weights": "random"} | changes)


def fit(loader, model=None, **changes):
    told = parameters(**changes)
    model = model or build("gaussian", told)
    SPEC.fit(model, told, context(loader, validation=[]))
    return model


@pytest.fixture(scope="module")
def images():
    return random_images(6)


@pytest.fixture(scope="module")
def fitted(images):
    return fit(batches(images))


def test_default_levels_are_those_at_strides_8_16_and_32(fitted):
    assert fitted.teacher_model.layers == ["blocks.2", "blocks.3", "blocks.4"]
    with torch.no_grad():
        shapes = [tuple(level.shape) for level in fitted.extract(random_images(2))]
    assert shapes == [(2, 32, 8, 8), (2, 48, 4, 4), (2, 64, 2, 2)]


class Levels(nn.Module):
    """Stands for a backbone with these features."""

    def __init__(self, *levels):
        super().__init__()
        self.levels = levels

    def forward(self, images):
        return dict(enumerate(self.levels))


def test_only_the_finest_level_is_half_its_neighbours():
    model = GaussianModel(BACKBONE, weights="random").eval()
    fine = torch.arange(1.0, 10.0, dtype=torch.bfloat16).view(1, 1, 3, 3)
    coarse = torch.tensor([1.0, 5.0], dtype=torch.bfloat16).view(1, 1, 1, 2)
    model.teacher_model = Levels(fine, coarse)
    model.gaussians = nn.ModuleList(Gaussian(0, 1, 1, False) for _ in range(2))
    finest, coarser = model.extract(random_images(1))
    # Means 3, 3.5, 4 and so on of 2 x 2, 2 x 3 and 3 x 3 neighbours.
    assert finest[0, 0].tolist() == [[2.0, 2.75, 3.5], [4.25, 5.0, 5.75], [6.5, 7.25, 8.0]]
    assert coarser.flatten().tolist() == [1, 5]
    assert finest.dtype == coarser.dtype == torch.float32


def test_each_level_has_the_distribution_of_its_features(fitted, images):
    with torch.no_grad():
        levels = fitted.extract(images)
        new = fitted.extract(random_images(2, seed=1))
        maps = fitted.maps(random_images(2, seed=1))
    for found, features, new_features in zip(maps, levels, new, strict=True):
        expected = gaussian_of(features, Parameters().shrinkage)(new_features)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_factor_of_all_features_changes_no_score(fitted, images):
    """A backbone with louder features gives the same scores: nothing depends on their scale."""
    model = build("gaussian", parameters())
    model.teacher_model.register_forward_hook(
        lambda *args: {name: 1000 * level for name, level in args[2].items()}
    )
    fit(batches(images), model)
    new = random_images(3, seed=1)
    with torch.inference_mode():
        torch.testing.assert_close(model(new), fitted(new), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1.0])
def test_held_out_distances_are_nearly_those_of_a_fit_without_the_image(shrinkage):
    """But for what all positions share, which the image changes a little as well."""
    features = random_features(100)
    gaussian = gaussian_of(features, shrinkage)
    seen, held_out = gaussian(features), gaussian.held_out(features)
    others = [torch.cat([features[:i], features[i + 1 :]]) for i in range(len(features))]
    fits = [gaussian_of(x, shrinkage) for x in others]
    expected = torch.cat([fit(features[i : i + 1]) for i, fit in enumerate(fits)])
    share = 0.7 if shrinkage else 0.2  # of the error that the image itself would make
    assert (held_out - expected).abs().mean() < share * (seen - expected).abs().mean()
    assert (held_out / expected).mean().item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("count", [2, 3])
def test_held_out_distances_of_very_few_images_are_finite(count):
    features = random_features(count)
    assert gaussian_of(features).held_out(features).isfinite().all()


def test_the_scales_are_those_of_held_out_distances_of_all_images(images):
    model = build("gaussian", parameters())
    told = context(batches(images[:4]), batches(images[4:]))
    SPEC.fit(model, parameters(), told)
    assert model.gaussians[0].count == len(images)
    levels = model.held_out_maps({"image": images}, torch.device("cpu"))
    for scale, level in zip(model.scales, levels, strict=True):
        assert scale.mean.mean().item() == pytest.approx(level.mean().item(), rel=0.02)


def test_distances_stay_in_float32_under_autocast():
    # The features are those that bfloat16 gives; the distances, of a hundred numbers, are not.
    features = random_features(20, channels=100)
    model = GaussianModel(BACKBONE, ["blocks.2"], "random", map_sizes=[(2, 4)]).eval()
    model.gaussians[0] = gaussian_of(features)
    model.extract = lambda images: [features]
    expected = model(random_images(1))["anomaly_map"]
    outputs = InPrecision(model, torch.bfloat16)(random_images(1))
    assert torch.equal(outputs["anomaly_map"], expected)


def test_neither_batches_nor_their_order_change_the_fit_by_more_than_rounding(fitted, images):
    other, new = fit(batches(images.flip(0), 1)), random_images(3, seed=1)
    with torch.inference_mode():
        torch.testing.assert_close(other(new), fitted(new), rtol=1e-3, atol=1e-3)


def test_the_seed_draws_the_channels_where_there_are_too_many(fitted, images):
    def fit_of(seed, **changes):
        return fit(batches(images), seed=seed, **changes)

    one, same, other = (fit_of(seed, max_channels=40) for seed in (0, 0, 1))  # of 32, 48 and 64
    assert [len(gaussian.channels) for gaussian in one.gaussians] == [32, 40, 40]
    assert_same_tensors(one, same)
    for index in (1, 2):
        chosen = one.gaussians[index].channels, other.gaussians[index].channels
        assert not torch.equal(*chosen)
    new = random_images(2, seed=1)
    with torch.inference_mode():
        assert not torch.equal(one(new)["pred_score"], other(new)["pred_score"])
    assert_same_tensors(fit_of(1), fitted)


@pytest.mark.parametrize(("shrinkage", "max_channels"), [(1.0, 128), (0.2, 40)])
def test_hyperparameters_are_what_a_file_needs(images, shrinkage, max_channels):
    model = fit(batches(images), shrinkage=shrinkage, max_channels=max_channels, top_fraction=0.1)
    content = snapshot("gaussian", model)
    assert content["hyperparameters"] == {
        "backbone": BACKBONE,
        "layers": ["blocks.2", "blocks.3", "blocks.4"],
        "weights": "random",
        "in_channels": 3,
        "top_fraction": 0.1,
        "map_sizes": [[8, 8], [4, 4], [2, 2]],
        "image_size": [64, 64],
        "max_channels": max_channels,
        "is_shared": shrinkage == 1,
    }
    restored, new = restore(content), random_images(3, seed=1)
    with torch.inference_mode():
        torch.testing.assert_close(restored(new), model(new), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1])
def test_shrinkage_is_a_share(shrinkage):
    with pytest.raises(ValidationError, match="shrinkage"):
        parameters(shrinkage=shrinkage)


def test_defaults_of_what_is_particular():
    assert parameters().by_section("gaussian")["gaussian"] == {
        "max_channels": 128,
        "shrinkage": 0.2,
    }
