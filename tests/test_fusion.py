import pytest
import torch

from anomaly_detection.features.moments import Moments
from anomaly_detection.models import fusion
from anomaly_detection.models.fusion import ScaledMapModel
from anomaly_detection.models.maps import image_scores
from anomaly_detection.trainer import TrainingError

CPU = torch.device("cpu")


class Channels(ScaledMapModel):
    """Takes the channels of an image for its maps, the second at half the size."""

    def __init__(self, top_fraction=0.0, map_sizes=(), factors=(1.0, 1.0), **options):
        super().__init__(top_fraction, map_sizes, **options)
        self.factors = factors

    def maps(self, images):
        fine, coarse = self.factors
        return [fine * images[:, 0], coarse * images[:, 1, ::2, ::2]]


def random_images(count, seed=0, size=(4, 6)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def batches(images, size=3):
    return [{"image": part} for part in images.split(size)]


def standardised(images, **options):
    model = Channels(**options)
    model.standardise(batches(images), CPU)
    return model


# Maps and scores


def test_map_is_the_mean_of_the_standardised_maps():
    # In hundredths, channel 0 has values 1 and 3 everywhere (mean 2, deviation 1), channel 1 10 and
    # 50 (30, 20). The new image's are 5 and 10: 3 deviations above the mean, and 1 below.
    normal = torch.zeros(2, 3, 4, 4)
    normal[:, 0] = torch.tensor([0.01, 0.03]).view(2, 1, 1)
    normal[:, 1] = torch.tensor([0.1, 0.5]).view(2, 1, 1)
    new = torch.zeros(1, 3, 4, 4)
    new[:, 0], new[:, 1] = 0.05, 0.1
    outputs = standardised(normal)(new)
    torch.testing.assert_close(outputs["anomaly_map"], torch.full((1, 1, 4, 4), 1.0))
    assert outputs["pred_score"].tolist() == pytest.approx([1])


def test_maps_are_standardised_before_they_are_enlarged_and_averaged():
    """Each coarse position by its own scale."""
    model, new = standardised(random_images(8)), random_images(2, seed=1)
    fine, coarse = (
        scale(x)[:, None] for scale, x in zip(model.scales, model.maps(new), strict=True)
    )
    enlarged = torch.nn.functional.interpolate(coarse, size=(4, 6), mode="bilinear")
    torch.testing.assert_close(model(new)["anomaly_map"], (fine + enlarged) / 2)


def test_the_first_map_gives_the_size_in_which_all_are_averaged(monkeypatch):
    """The mean is enlarged to the image once, not each map."""

    def maps(self, images):
        return [images[:, 0, ::2, ::2], images[:, 1, ::4, ::4]]

    monkeypatch.setattr(Channels, "maps", maps)
    model, new = standardised(random_images(8, size=(8, 8))), random_images(1, 1, (8, 8))
    fine, coarse = (
        scale(x)[:, None] for scale, x in zip(model.scales, model.maps(new), strict=True)
    )
    coarse = torch.nn.functional.interpolate(coarse, size=(4, 4), mode="bilinear")
    mean = torch.nn.functional.interpolate((fine + coarse) / 2, size=(8, 8), mode="bilinear")
    torch.testing.assert_close(model(new)["anomaly_map"], mean)


@pytest.mark.parametrize("top_fraction", [0.0, 0.1, 1.0])
def test_score_is_the_mean_of_the_maps_highest_values(top_fraction):
    outputs = standardised(random_images(5), top_fraction=top_fraction)(random_images(3, seed=1))
    assert outputs["anomaly_map"].shape == (3, 1, 4, 6)
    expected = image_scores(outputs["anomaly_map"], top_fraction)
    assert torch.equal(outputs["pred_score"], expected)


@pytest.mark.parametrize("factors", [(1000.0, 1.0), (1.0, 1000.0), (1e-4, 1e4)], ids=str)
def test_the_scale_of_a_map_changes_no_score(factors):
    normal, new = random_images(6), random_images(4, seed=1)
    expected = standardised(normal)(new)
    for key, values in standardised(normal, factors=factors)(new).items():
        torch.testing.assert_close(values, expected[key], rtol=1e-4, atol=1e-4)


def test_outputs_do_not_depend_on_the_batch():
    model, new = standardised(random_images(5)), random_images(4, seed=1)
    together = model(new)
    alone = [model(image[None]) for image in new]
    for key, values in together.items():
        torch.testing.assert_close(torch.cat([outputs[key] for outputs in alone]), values)


# Standardising


def test_the_scales_do_not_depend_on_batches_or_order():
    images = random_images(7)
    model = Channels()
    model.standardise(batches(images.flip(0), 2), CPU)
    for key, value in standardised(images).state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_a_second_standardising_starts_anew():
    model = standardised(random_images(5, seed=1))
    model.standardise(batches(random_images(6)), CPU)
    for key, value in standardised(random_images(6)).state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_maps_are_found_in_eval_mode_and_without_gradients():
    modes = []

    class Model(Channels):
        def maps(self, images):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().maps(images)

    Model().train().standardise(batches(random_images(4), 4), CPU)
    assert modes == [(False, False)]


def test_a_state_dict_and_the_hyperparameters_restore_the_model():
    model = standardised(random_images(5), top_fraction=0.1)
    assert model.hyperparameters == {
        "top_fraction": 0.1,
        "in_channels": 3,
        "map_sizes": [[4, 6], [2, 3]],
        "image_size": [4, 6],
    }
    restored = Channels(**model.hyperparameters)
    restored.load_state_dict(model.state_dict())
    new = random_images(2, seed=1)
    assert torch.equal(restored(new)["anomaly_map"], model(new)["anomaly_map"])


@pytest.mark.parametrize("counts", [[2, 5], [6, 1], [0, 7], [7, 0]], ids=str)
def test_images_of_all_processes_count(monkeypatch, counts):
    """A process may also have none."""
    images, model = random_images(7), Channels()
    expected = standardised(images).state_dict()
    ours, theirs = images.split(counts)
    levels = [Moments(), Moments()] if len(theirs) else []
    for moments, level in zip(levels, model.maps(theirs), strict=False):
        moments.add(level[:, None])
    monkeypatch.setattr(fusion, "gather", lambda values: [*values, levels])
    model.standardise(batches(ours) if len(ours) else [], CPU)
    for key, value in expected.items():
        torch.testing.assert_close(model.state_dict()[key], value)


# Refusals


def test_a_model_that_is_not_fitted_refuses_to_score():
    with pytest.raises(TrainingError, match=r"^the model must be fitted before .* scored\.$"):
        Channels()(random_images(1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_maps_that_are_not_finite_are_refused(value):
    images = random_images(4)
    images[3, 1, 2, 2] = value
    with pytest.raises(TrainingError, match="must be finite") as error:
        standardised(images)
    assert "\n" not in str(error.value)


def test_no_images_are_refused():
    with pytest.raises(TrainingError, match="there must be some, got 0 images") as error:
        Channels().standardise([], CPU)
    assert "\n" not in str(error.value)


def test_images_of_another_size_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"shape \(N, 3, 4, 6\) .* got \(1, 3, 8, 6\)"):
        standardised(random_images(3))(random_images(1, size=(8, 6)))


@pytest.mark.parametrize("top_fraction", [-0.1, 2])
def test_a_top_fraction_outside_of_0_to_1_is_refused(top_fraction):
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\], got {top_fraction}"):
        Channels(top_fraction)
