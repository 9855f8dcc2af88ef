"""Maps as one: their scales, their mean and the image's score; and the ensemble of models."""

import pytest
import torch
from builders.models import (
    CPU,
    HELD_OUT,
    Killed,
    Watched,
    batches,
    context,
    generator,
    random_images,
    saved,
)
from pydantic import ValidationError

from anomaly_detection import models
from anomaly_detection.features.moments import Moments
from anomaly_detection.features.weights import BackboneError
from anomaly_detection.models import fusion
from anomaly_detection.models.ensemble.config import Parameters
from anomaly_detection.models.fusion import ScaledMapModel
from anomaly_detection.models.maps import (
    PRIOR_IMAGES,
    MapScale,
    image_scores,
    mean_of_neighbours,
    resize_maps,
)
from anomaly_detection.models.stfpm.spec import MIN_BATCHES
from anomaly_detection.trainer import TrainingError, seed_everything

ENSEMBLE = models.spec("ensemble")
NUM_EPOCHS = models.parameters("stfpm")().num_epochs
TIMES = MIN_BATCHES // 2  # of the two batches of the images here


# Sizes, neighbours, scores


def test_maps_are_enlarged_bilinearly():
    # 0 and 2, doubled without aligned corners: 0, 0.5, 1.5, 2.
    maps = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    assert resize_maps(maps, (1, 4)).flatten().tolist() == pytest.approx([0.0, 0.5, 1.5, 2.0])
    assert resize_maps(maps, (1, 2)) is maps


def test_neighbours_beyond_the_border_do_not_count():
    level = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    expected = [[3.0, 3.5, 4.0], [4.5, 5.0, 5.5], [6.0, 6.5, 7.0]]  # corners of 4, edges of 6
    assert mean_of_neighbours(level)[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, 4.0), (0.01, 4.0), (0.5, 3.5), (1.0, 2.5)]
)
def test_score_is_the_mean_of_the_highest_pixels_and_of_one_at_least(fraction, expected):
    assert image_scores(torch.tensor([[[[1.0, 4.0], [3.0, 2.0]]]]), fraction).item() == expected


# The scale of a map


def scale_of(maps):
    """The scale of maps (n, H, W)."""
    moments, scale = Moments(), MapScale(maps.shape[1:])
    assert torch.equal(scale(maps), maps)  # before it is estimated
    moments.add(maps[:, None])
    scale.estimate(moments)
    return scale


def random_maps(count, seed=0):
    return torch.rand(count, 4, 5, generator=generator(seed)) + torch.arange(5.0)


def test_a_single_position_is_standardised_by_its_own_values():
    # 1 and 3: mean 2, deviation 1.
    scale = scale_of(torch.tensor([1.0, 3.0]).view(2, 1, 1))
    assert (scale.mean.item(), scale.deviation.item()) == (2, 1)
    assert scale(torch.tensor([[[5.0]], [[0.0]]])).flatten().tolist() == [3, -2]


def test_a_single_image_is_standardised_by_all_positions_and_a_little_by_its_own():
    # Of all: mean 2, variance 64 / 4 - 4 = 12. At the right end and beside it: mean 4, variance 16;
    # at the left end: 0 and 0. One image counts for 1 of 129, all positions for 128.
    assert PRIOR_IMAGES == 128
    scale = scale_of(torch.tensor([[[0.0, 0.0, 0.0, 8.0]]]))
    expected = [128 * 2 / 129, (4 + 128 * 2) / 129]
    assert scale.mean[0, [0, 3]].tolist() == pytest.approx(expected)
    variances = scale.deviation.square()[0, [0, 3]].tolist()
    assert variances == pytest.approx([128 * 12 / 129, (16 + 128 * 12) / 129])


@pytest.mark.parametrize("repeats", [1, 10, 1000])
def test_few_images_lean_on_all_positions_and_many_on_their_own(repeats):
    """The way from all positions' mean to a position's own is n / (n + 128) for n images."""
    # Always 0 on the left, with variance 0; 3 and 5 on the right: mean 4, variance 1.
    maps = torch.zeros(2, 1, 6)
    maps[:, :, 3:] = torch.tensor([3.0, 5.0]).view(2, 1, 1)
    scale = scale_of(maps.repeat(repeats, 1, 1))
    trust = 2 * repeats / (2 * repeats + PRIOR_IMAGES)
    of_all = (9 + 25) / 4 - 4
    means = [2 * (1 - trust), 4 * trust + 2 * (1 - trust)]
    variances = [(1 - trust) * of_all, trust + (1 - trust) * of_all]
    assert scale.mean[0, [0, 5]].tolist() == pytest.approx(means)
    assert scale.deviation.square()[0, [0, 5]].tolist() == pytest.approx(variances)


@pytest.mark.parametrize(("factor", "offset"), [(1e-6, 0), (1e6, 0), (1, 10), (1000, -5)])
def test_a_common_factor_and_offset_change_no_standardised_map(factor, offset):
    normal, new = random_maps(5), random_maps(2, seed=1)
    changed = scale_of(factor * normal + offset)(factor * new + offset)
    torch.testing.assert_close(changed, scale_of(normal)(new), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
@pytest.mark.parametrize("count", [1, 5])
def test_the_deviation_is_never_zero(value, size, count):
    """Not even of maps that are the same everywhere, in which another value still stands out."""
    scale = scale_of(torch.full((count, *size), value))
    assert scale.deviation.min() > 0
    assert scale(torch.full((1, *size), value)).abs().max() < 1
    other = scale(torch.full((1, *size), value + 1))
    assert other.isfinite().all()
    assert other.min() > 1


def test_a_position_that_never_varied_has_a_finite_scale():
    maps = random_maps(4)
    maps[:, :2, :2] = 0
    assert scale_of(maps).deviation.min() > 0.01


@pytest.mark.parametrize("size", [(6, 5), (4, 1), (1, 5), (5, 4)], ids=str)
def test_maps_of_another_size_are_refused_with_both_sizes(size):
    """Also those of a single row or column, which would be broadcast."""
    with pytest.raises(ValueError, match=r"maps are \(4, 5\), got maps of") as error:
        scale_of(random_maps(2))(torch.zeros(1, *size))
    assert str(size) in str(error.value)


# Several maps as one


class Channels(ScaledMapModel):
    """Takes the channels of an image for its maps, by default the second at half the size."""

    def __init__(self, factors=(1.0, 1.0), strides=(1, 2), **options):
        super().__init__(**{"top_fraction": 0.0, "map_sizes": ()} | options)
        self.factors, self.strides = factors, strides

    def maps(self, images):
        told = enumerate(zip(self.factors, self.strides, strict=True))
        return [factor * images[:, i, ::stride, ::stride] for i, (factor, stride) in told]


def random_floats(count, seed=0, size=(4, 6)):
    return torch.rand(count, 3, *size, generator=generator(seed))


def standardised(images, **options):
    model = Channels(**options)
    model.standardise(batches(images, 3), CPU)
    return model


def enlarged(maps, size):
    return torch.nn.functional.interpolate(maps, size=size, mode="bilinear")


def test_map_is_the_mean_of_the_standardised_maps():
    # In hundredths, channel 0 has values 1 and 3 everywhere (mean 2, deviation 1), channel 1 10 and
    # 50 (30, 20). The new image's are 5 and 10: 3 deviations above the mean, and 1 below.
    normal, new = torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    normal[:, 0] = torch.tensor([0.01, 0.03]).view(2, 1, 1)
    normal[:, 1] = torch.tensor([0.1, 0.5]).view(2, 1, 1)
    new[:, 0], new[:, 1] = 0.05, 0.1
    outputs = standardised(normal)(new)
    torch.testing.assert_close(outputs["anomaly_map"], torch.full((1, 1, 4, 4), 1.0))
    assert outputs["pred_score"].tolist() == pytest.approx([1])


@pytest.mark.parametrize("strides", [(1, 2), (2, 4)])
def test_maps_are_standardised_before_they_are_enlarged_and_averaged(strides):
    """Each coarse position by its own scale.

    The first map gives the size for that; the mean is enlarged to the image once, not each map.
    """
    model = standardised(random_floats(8, size=(8, 8)), strides=strides)
    new = random_floats(2, 1, (8, 8))
    pairs = zip(model.scales, model.maps(new), strict=True)
    fine, coarse = (scale(level)[:, None] for scale, level in pairs)
    mean = (fine + enlarged(coarse, fine.shape[-1])) / 2
    torch.testing.assert_close(model(new)["anomaly_map"], enlarged(mean, 8))


@pytest.mark.parametrize("top_fraction", [0.0, 0.1, 1.0])
def test_score_is_the_mean_of_the_maps_highest_values(top_fraction):
    outputs = standardised(random_floats(5), top_fraction=top_fraction)(random_floats(3, seed=1))
    assert outputs["anomaly_map"].shape == (3, 1, 4, 6)
    expected = image_scores(outputs["anomaly_map"], top_fraction)
    assert torch.equal(outputs["pred_score"], expected)


@pytest.mark.parametrize("factors", [(1000.0, 1.0), (1.0, 1000.0), (1e-4, 1e4)], ids=str)
def test_the_scale_of_a_map_changes_no_score(factors):
    normal, new = random_floats(6), random_floats(4, seed=1)
    changed = standardised(normal, factors=factors)(new)
    torch.testing.assert_close(changed, standardised(normal)(new), rtol=1e-4, atol=1e-4)


def test_the_scales_do_not_depend_on_batches_or_order():
    images, model = random_floats(7), Channels()
    model.standardise(batches(images.flip(0), 2), CPU)
    torch.testing.assert_close(model.state_dict(), standardised(images).state_dict())


def test_a_second_standardising_starts_anew():
    model, expected = standardised(random_floats(5, seed=1)), standardised(random_floats(6))
    model.standardise(batches(random_floats(6), 3), CPU)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_maps_are_found_in_eval_mode_and_without_gradients():
    modes = []

    class Model(Channels):
        def maps(self, images):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().maps(images)

    Model().train().standardise(batches(random_floats(4)), CPU)
    assert modes == [(False, False)]


def test_a_state_dict_and_the_hyperparameters_restore_the_model():
    model = standardised(random_floats(5), top_fraction=0.1)
    assert model.hyperparameters == {
        "top_fraction": 0.1,
        "in_channels": 3,
        "map_sizes": [[4, 6], [2, 3]],
        "image_size": [4, 6],
    }
    restored = Channels(**model.hyperparameters)
    restored.load_state_dict(model.state_dict())
    new = random_floats(2, seed=1)
    assert torch.equal(restored(new)["anomaly_map"], model(new)["anomaly_map"])


@pytest.mark.parametrize("counts", [[2, 5], [6, 1], [0, 7], [7, 0]], ids=str)
def test_images_of_all_processes_count(monkeypatch, counts):
    """A process may also have none."""
    images, model = random_floats(7), Channels()
    ours, theirs = images.split(counts)
    levels = [Moments(), Moments()] if len(theirs) else []
    for moments, level in zip(levels, model.maps(theirs), strict=False):
        moments.add(level[:, None])
    monkeypatch.setattr(fusion, "gather", lambda values: [*values, levels])
    model.standardise(batches(ours, 3) if len(ours) else [], CPU)
    monkeypatch.undo()
    torch.testing.assert_close(model.state_dict(), standardised(images).state_dict())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_maps_that_are_not_finite_are_refused(value):
    images = random_floats(4)
    images[3, 1, 2, 2] = value
    with pytest.raises(TrainingError, match=r"\A.*must be finite.*\Z"):
        standardised(images)


def test_no_images_are_refused():
    with pytest.raises(TrainingError, match=r"\A.*there must be some, got 0 images.*\Z"):
        Channels().standardise([], CPU)


def test_a_map_of_a_model_that_is_not_fitted_or_for_another_size_is_refused():
    with pytest.raises(TrainingError, match=r"\Athe model must be fitted before .* scored\.\Z"):
        Channels()(random_floats(1))
    with pytest.raises(ValueError, match=r"shape \(N, 3, 4, 6\) .* got \(1, 3, 8, 6\)"):
        standardised(random_floats(3))(random_floats(1, size=(8, 6)))


@pytest.mark.parametrize("top_fraction", [-0.1, 2])
def test_a_top_fraction_outside_of_0_to_1_is_refused(top_fraction):
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\], got {top_fraction}"):
        Channels(top_fraction=top_fraction)


# The ensemble


def parameters(*members, **changes):
    values = {"backbone": "test_resnet", "weights": "random", "batch_size": 4}
    return Parameters(**values | {"members": list(members)} | changes)


def fit(told, state, *loaders):
    seed_everything(told.seed)
    model = ENSEMBLE.build(told)
    fit, validation = loaders or (batches(random_images(6)), HELD_OUT)
    return model, ENSEMBLE.fit(model, told, context(fit, validation, state))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return fit(parameters("patchcore", "gaussian"), tmp_path_factory.mktemp("state"))[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An ensemble of which one member is trained in epochs, the fit's result, and its state."""
    state = tmp_path_factory.mktemp("state")
    return *fit(parameters("stfpm", "patchcore"), state), state


def test_map_is_the_mean_of_the_members_maps_each_standardised_once_more(fitted):
    new = random_images(2, seed=1)
    with torch.inference_mode():
        maps = [member(new)["anomaly_map"] for member in fitted.members.values()]
        pairs = zip(maps, fitted.scales, strict=True)
        scaled = [(level - scale.mean) / scale.deviation for level, scale in pairs]
        outputs = fitted(new)
    assert [tuple(scale.mean.shape) for scale in fitted.scales] == [(64, 64), (64, 64)]
    torch.testing.assert_close(outputs["anomaly_map"], sum(scaled) / 2)


def test_each_member_is_the_model_that_it_is_alone(fitted):
    for name, own in parameters("patchcore", "gaussian").of_members().items():
        member = fitted.members[name]
        alone = models.spec(name).build(own)
        alone.teacher_model.load_state_dict(member.teacher_model.state_dict())  # the random weights
        models.spec(name).fit(alone, own, context(batches(random_images(6))))
        for key, value in alone.state_dict().items():
            assert torch.equal(member.state_dict()[key], value), key


def test_a_fit_killed_after_a_member_ends_with_the_same_bytes(trained, tmp_path):
    """In the pass for the second member, then in that for the ensemble's scales.

    The first member has been trained by then, and is not trained again.
    """
    told, state, images = parameters("stfpm", "patchcore"), tmp_path / "state", random_images(6)
    # Standardising the teacher's channels takes a pass, each epoch as many as give enough batches.
    in_second_member = Watched(batches(images), interrupted=1 + NUM_EPOCHS * TIMES + 1)
    with pytest.raises(Killed):
        fit(told, state, in_second_member, HELD_OUT)
    # The trained member's scales take a pass, the second member's patches and scales two.
    in_scales, again = Watched(HELD_OUT, interrupted=4), Watched(batches(images))
    with pytest.raises(Killed):
        fit(told, state, again, in_scales)
    assert again.passes == 3
    resumed, result = fit(told, state, batches(images), HELD_OUT)
    assert result == trained[1]
    expected = saved("ensemble", trained[0], tmp_path / "model.pt")
    assert saved("ensemble", resumed, tmp_path / "model.pt") == expected


def test_the_history_is_that_of_the_member_that_has_one(trained, tmp_path):
    _, second = fit(parameters("gaussian", "stfpm"), tmp_path / "second")
    for result, state in ((trained[1], trained[2]), (second, tmp_path / "second")):
        assert [path.name for path in state.iterdir()] == ["stfpm"]  # its state
        assert [row["epoch"] for row in result.history] == list(range(1, NUM_EPOCHS + 1))
    assert fit(parameters("gaussian"), tmp_path)[1].history == []


def test_the_hyperparameters_are_those_of_the_members_and_the_ensembles_own(fitted):
    assert fitted.hyperparameters == {
        "members": {name: model.hyperparameters for name, model in fitted.members.items()},
        "top_fraction": 0.01,
        "in_channels": 3,
        "map_sizes": [[64, 64], [64, 64]],
        "image_size": [64, 64],
    }


def test_members_get_the_shared_values_and_have_their_own_defaults():
    told = parameters("stfpm", "gaussian", top_fraction=0.2, seed=3, layers=["layer2"])
    of_members = told.of_members()
    assert list(of_members) == told.parts() == ["stfpm", "gaussian"]
    for name, own in of_members.items():
        shared = {"backbone", "weights", "batch_size", "top_fraction", "seed", "layers"}
        assert own.model_dump(include=shared) == told.model_dump(include=shared)
        rest = {"num_epochs", "hard_fraction", "shrinkage", "max_channels"}
        assert own.model_dump(include=rest) == models.parameters(name)().model_dump(include=rest)
    assert {own.precision for own in of_members.values()} == {"float32"}
    model = ENSEMBLE.build(parameters("patchcore", "gaussian"))  # with the layers of each
    layers = [member.teacher_model.layers for member in model.members.values()]
    assert layers == [["layer2", "layer3"], ["layer2", "layer3", "layer4"]]


@pytest.mark.parametrize(
    "members",
    [["gaussian", "gaussian"], ["ensemble"], ["gaussian", "ensemble"], ["gaussian2"], []],
    ids=str,
)
def test_members_must_be_different_other_models_and_there_must_be_one(members):
    with pytest.raises(ValidationError, match=r"members\n  ") as error:
        parameters(*members)
    if members:
        assert "different models of efficientad, gaussian, patchc" in str(error.value)


def test_the_check_is_that_of_the_members():
    parameters("gaussian", "patchcore").check()
    with pytest.raises(BackboneError, match="must be a timm model, got 'resnet19'"):
        parameters("gaussian", backbone="resnet19").check()
    with pytest.raises(BackboneError, match="must be levels of test_resnet, got layer9"):
        parameters("gaussian", layers=["layer9"]).check()
