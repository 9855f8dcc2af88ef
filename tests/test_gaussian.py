import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.spatial.distance import mahalanobis
from scipy.stats import chisquare
from torch import nn

from anomaly_detection.data import create_dataloader
from anomaly_detection.features.moments import Moments
from anomaly_detection.models import FitContext, restore, snapshot, spec
from anomaly_detection.models.files import InPrecision
from anomaly_detection.models.gaussian import Gaussian, GaussianModel
from anomaly_detection.models.gaussian.config import Parameters
from anomaly_detection.models.gaussian.model import REGULARISATION
from anomaly_detection.trainer import TrainingError

SPEC = spec("gaussian")
BACKBONE = "test_efficientnet"  # timm's smallest
CROSS = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]]).view(4, 2, 1, 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_of(features, shrinkage=0.2):
    """The distribution of features (N, C, H, W)."""
    moments = Moments()
    moments.add(features)
    num_channels = features.shape[1]
    gaussian = Gaussian(features[0, 0].numel(), num_channels, num_channels, shrinkage == 1)
    gaussian.estimate(moments, shrinkage)
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
    variance = np.diagonal(shared).mean()
    return (
        (1 - shrinkage) * own + shrinkage * shared + REGULARISATION * variance * np.eye(len(shared))
    )


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
@pytest.mark.parametrize(("count", "channels"), [(20, 3), (5, 8), (2, 4)])
def test_distance_is_scipys_at_each_position(shrinkage, count, channels):
    """Also where there are fewer images than channels."""
    features, new = random_features(count, channels), random_features(3, channels, seed=1)
    distances = gaussian_of(features, shrinkage)(new)
    assert distances.shape == (3, 2, 4)
    inverses = np.linalg.inv(covariances(features, shrinkage)).reshape(2, 4, channels, channels)
    means = features.double().mean(dim=0).numpy()
    for image, row, column in np.ndindex(3, 2, 4):
        vector = new[image, :, row, column].double().numpy()
        expected = mahalanobis(vector, means[:, row, column], inverses[row, column])
        found = distances[image, row, column].item() * channels**0.5
        assert found == pytest.approx(expected, rel=1e-4)


def test_without_shrinkage_no_position_knows_of_the_others():
    features = random_features(30)
    other = features.clone()
    other[:, 0, 1, 3] *= -1  # other correlations, but the same variances
    for shrinkage, is_same in ((0.0, True), (0.2, False), (1.0, False)):
        here, there = (gaussian_of(x, shrinkage)(features)[:, 0, 0] for x in (features, other))
        assert torch.allclose(here, there, rtol=1e-5) == is_same


def test_full_shrinkage_keeps_one_matrix_for_all_positions():
    features = random_features(10)
    shared, own = gaussian_of(features, shrinkage=1), gaussian_of(features, shrinkage=0.999999)
    assert shared.whitening.shape == (1, 3, 3)
    assert own.whitening.shape == (8, 3, 3)
    torch.testing.assert_close(shared(features), own(features), rtol=1e-4, atol=1e-5)


def test_an_unusual_feature_stands_where_it_is():
    features = torch.randn(20, 3, 5, 7, generator=generator())
    new = features[:1].clone()
    new[0, :, 1, 4] += 100
    distances = gaussian_of(features)(new)[0]
    assert divmod(distances.argmax().item(), 7) == (1, 4)
    assert distances.flatten().sort().values[-2] < 5


@pytest.mark.parametrize("factor", [1e-4, 1000.0])
def test_a_factor_of_all_features_changes_no_distance(factor):
    """So that the regularisation suits every backbone."""
    features, new = random_features(10), random_features(3, seed=1)
    expected = gaussian_of(features)(new)
    torch.testing.assert_close(gaussian_of(factor * features)(factor * new), expected)


def test_turning_the_features_changes_no_distance():
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator())).Q
    features, new = random_features(10), random_features(3, seed=1)
    turned, new_turned = (torch.einsum("nchw,cd->ndhw", x, turn) for x in (features, new))
    expected = gaussian_of(features)(new)
    torch.testing.assert_close(gaussian_of(turned)(new_turned), expected, rtol=1e-3, atol=1e-4)


def test_distances_do_not_depend_on_the_batch():
    gaussian, new = gaussian_of(random_features(10)), random_features(5, seed=1)
    alone = torch.cat([gaussian(image[None]) for image in new])
    torch.testing.assert_close(gaussian(new), alone)


def test_the_mean_square_of_the_fitted_images_is_nearly_one():
    """What the root of C is for: levels with few and with many channels have the same scale."""
    for channels in (2, 32):
        features = torch.randn(500, channels, 2, 2, generator=generator())
        assert gaussian_of(features)(features).square().mean().item() == pytest.approx(1, abs=0.05)


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


def test_the_state_dict_is_the_whole_distribution():
    for is_shared in (False, True):
        gaussian, copy = (
            gaussian_of(random_features(5), float(is_shared)),
            Gaussian(8, 3, 3, is_shared),
        )
        copy.load_state_dict(gaussian.state_dict())
        assert torch.equal(copy(random_features(2)), gaussian(random_features(2)))
        assert copy.mean.dtype == copy.whitening.dtype == torch.float32


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count):
    moments = Moments()
    if count:
        moments.add(random_features(1))
    with pytest.raises(TrainingError, match=rf"at least two images, got {count}\.$"):
        Gaussian(8, 3, 3, False).estimate(moments, 0.2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value):
    features = random_features(4)
    features[2, 1, 0, 3] = value
    with pytest.raises(TrainingError, match=r"^features must be finite.*to float32\.$"):
        gaussian_of(features)


# The model


def random_images(count, size=64, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=generator(seed)).byte()


def batches(images, size=4):
    return [{"image": part} for part in images.split(size)]


HELD_OUT = batches(random_images(3, seed=9))


def parameters(**changes):
    return Parameters(**{"backbone": BACKBONE, "weights": "random"} | changes)


def new_model(parameters):
    torch.manual_seed(0)  # the random weights
    model = SPEC.build(parameters)
    torch.seed()  # on which no fit may depend
    return model


def context(loader):
    return FitContext(loader, HELD_OUT, Path("unused"), torch.device("cpu"))


def fit(images, loader=None, **changes):
    told = parameters(**changes)
    model = new_model(told)
    SPEC.fit(model, told, context(batches(images) if loader is None else loader))
    return model


@pytest.fixture(scope="module")
def images():
    return random_images(6)


@pytest.fixture(scope="module")
def fitted(images):
    return fit(images)


def saved(path, model):
    torch.save(snapshot("gaussian", model), path)
    return path.read_bytes()


def assert_same_tensors(one, other, **tolerance):
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=name, **tolerance)


def test_default_levels_are_those_at_strides_8_16_and_32(fitted):
    assert fitted.teacher.layers == ["blocks.2", "blocks.3", "blocks.4"]
    with torch.no_grad():
        shapes = [tuple(level.shape) for level in fitted.extract(random_images(2))]
    assert shapes == [(2, 32, 8, 8), (2, 48, 4, 4), (2, 64, 2, 2)]


def test_only_the_finest_level_is_averaged_over_neighbours():
    model = GaussianModel(BACKBONE, weights="random").eval()
    fine = torch.arange(1.0, 10.0, dtype=torch.bfloat16).view(1, 1, 3, 3)
    coarse = torch.tensor([1.0, 5.0], dtype=torch.bfloat16).view(1, 1, 1, 2)

    class Levels(nn.Module):
        def forward(self, images):
            return {"fine": fine, "coarse": coarse}

    model.teacher = Levels()
    model.gaussians = nn.ModuleList(Gaussian(0, 1, 1, False) for _ in range(2))
    finest, coarser = model.extract(random_images(1))
    assert finest[0, 0].tolist() == [[3.0, 3.5, 4.0], [4.5, 5.0, 5.5], [6.0, 6.5, 7.0]]
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


def test_a_factor_of_all_features_changes_no_score(images):
    """A backbone with louder features gives the same scores: nothing depends on their scale."""

    class Louder(nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self.teacher = teacher

        def forward(self, images):
            return {name: 1000 * level for name, level in self.teacher(images).items()}

    told = parameters()
    model = new_model(told)
    model.teacher = Louder(model.teacher)
    SPEC.fit(model, told, context(batches(images)))
    new = random_images(3, seed=1)
    with torch.inference_mode():
        outputs, expected = model(new), fit(images)(new)
    torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-3)


def test_outputs_do_not_depend_on_the_batch(fitted):
    new = random_images(5, seed=1)
    with torch.inference_mode():
        together = fitted(new)
        for i, image in enumerate(new):
            for key, values in fitted(image[None]).items():
                torch.testing.assert_close(values[0], together[key][i], rtol=1e-3, atol=1e-3)


def test_distances_stay_in_float32_under_autocast(images):
    # The features are those that bfloat16 gives; the distances, of a hundred numbers, are not.
    features = random_features(20, channels=100)
    model = GaussianModel(BACKBONE, ["blocks.2"], "random", map_sizes=[(2, 4)]).eval()
    model.gaussians[0] = gaussian_of(features)
    model.extract = lambda images: [features]
    expected = model(random_images(1))["anomaly_map"]
    outputs = InPrecision(model, torch.bfloat16)(random_images(1))
    assert torch.equal(outputs["anomaly_map"], expected)


def test_neither_batches_nor_their_order_change_the_fit_by_more_than_rounding(fitted, images):
    other, new = fit(images, batches(images.flip(0), 1)), random_images(3, seed=1)
    with torch.inference_mode():
        torch.testing.assert_close(other(new), fitted(new), rtol=1e-3, atol=1e-3)


def test_a_fit_with_one_image_more_gives_the_model_of_all(fitted, images):
    model, told = fit(images[:-1]), parameters()
    few = model.gaussians[0].mean.clone()
    SPEC.fit(model, told, context(batches(images)))
    assert_same_tensors(model, fitted, rtol=0, atol=0)
    assert not torch.equal(model.gaussians[0].mean, few)


def test_the_same_images_give_the_same_bytes(tmp_path, images):
    data = [{"image": image} for image in images]
    loaders = [create_dataloader(data, 2, shuffle=True, seed=0) for _ in range(2)]
    list(loaders[1])  # as if a fit had been killed, with the loader in another epoch
    one, other = (saved(tmp_path / "model.pt", fit(images, loader)) for loader in loaders)
    assert one == other


def test_the_fit_is_one_pass_over_all_images(images):
    class Loader(list):
        epochs, passes = (), 0

        @property
        def sampler(self):
            return self

        def set_epoch(self, epoch):
            self.epochs += (epoch,)

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    loader = Loader(batches(images))
    fit(images, loader)
    assert (loader.epochs, loader.passes) == ((1,), 1)


def test_the_global_generators_are_left_alone(images):
    told = parameters()
    model = new_model(told)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    SPEC.fit(model, told, context(batches(images)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]  # noqa: NPY002


def test_channels_are_chosen_at_random_and_kept_in_their_order():
    gaussian, draws = Gaussian(0, 5, 2, False), Counter()
    chance = generator()
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


def test_the_seed_draws_the_channels_where_there_are_too_many(images):
    told = {"max_channels": 40}  # of 32, 48 and 64
    one, same, other = (fit(images, seed=seed, **told) for seed in (0, 0, 1))
    assert [len(gaussian.channels) for gaussian in one.gaussians] == [32, 40, 40]
    assert_same_tensors(one, same, rtol=0, atol=0)
    for index in (1, 2):
        chosen = one.gaussians[index].channels, other.gaussians[index].channels
        assert not torch.equal(*chosen)
    new = random_images(2, seed=1)
    with torch.inference_mode():
        assert not torch.equal(one(new)["pred_score"], other(new)["pred_score"])


def test_the_seed_changes_nothing_where_all_channels_are_used(fitted, images):
    assert_same_tensors(fit(images, seed=1), fitted, rtol=0, atol=0)


def test_the_fit_computes_in_the_precision_that_it_tells_and_keeps_float32(fitted, images):
    for precision in ("float32", "bfloat16"):
        told = parameters(precision=precision)
        model = new_model(told)
        assert SPEC.fit(model, told, context(batches(images))).precision == precision
        assert model.gaussians[0].whitening.dtype == torch.float32
        is_same = torch.equal(model.gaussians[0].mean, fitted.gaussians[0].mean)
        assert is_same == (precision == "float32")


def test_default_precision_does_not_depend_on_the_hardware():
    assert Parameters().precision == "float32"


@pytest.mark.parametrize(("shrinkage", "max_channels"), [(0.2, 128), (1.0, 128), (0.2, 40)])
def test_a_file_restores_the_scores(tmp_path, images, shrinkage, max_channels):
    model = fit(images, shrinkage=shrinkage, max_channels=max_channels, top_fraction=0.1)
    saved(tmp_path / "model.pt", model)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
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
    assert not any(isinstance(module, nn.BatchNorm2d) for module in restored.modules())
    with torch.inference_mode():
        torch.testing.assert_close(restored(new), model(new), rtol=1e-2, atol=1e-2)


def test_one_matrix_for_all_positions_makes_a_smaller_file(tmp_path, fitted, images):
    models = fitted, fit(images, shrinkage=1.0)
    own, shared = (len(saved(tmp_path / "model.pt", model)) for model in models)
    others = 4 * (63 * 32**2 + 15 * 48**2 + 3 * 64**2)  # bytes of the other positions' matrices
    assert own - shared == pytest.approx(others, rel=0.01)


def test_training_mode_leaves_the_backbone_in_eval_mode_and_the_outputs_as_they_are(fitted, images):
    expected = fitted.eval()(images)
    for key, values in fitted.train()(images).items():
        assert torch.equal(values, expected[key])
    assert not any(module.training for module in fitted.teacher.modules())
    assert not any(parameter.requires_grad for parameter in fitted.parameters())
    fitted.eval()


# Refusals


@pytest.mark.parametrize("count", [0, 1])
def test_a_fit_needs_two_images(images, count):
    with pytest.raises(TrainingError, match=f"at least two images, got {count}"):
        fit(images, batches(images[:count]) if count else [])


def test_a_fit_needs_validation_images(images):
    told = parameters()
    nothing = FitContext(batches(images), [], Path("unused"), torch.device("cpu"))
    with pytest.raises(TrainingError, match="there must be some, got 0 images"):
        SPEC.fit(new_model(told), told, nothing)


def test_a_model_that_is_not_fitted_refuses_to_score(images):
    with pytest.raises(TrainingError, match="must be fitted before"):
        new_model(parameters()).eval()(images)


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1])
def test_shrinkage_is_a_share(shrinkage):
    with pytest.raises(ValidationError, match="shrinkage"):
        parameters(shrinkage=shrinkage)


def test_what_is_particular_stands_in_the_models_own_section():
    sections = parameters().by_section("gaussian")
    assert sections["gaussian"] == {"max_channels": 128, "shrinkage": 0.2}
    assert set(sections["training"]) == {"batch_size", "precision", "seed"}
