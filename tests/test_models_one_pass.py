"""Models that are fitted without gradients and without state: gaussian and patchcore."""

import random

import numpy as np
import pytest
import torch
from builders.models import (
    Watched,
    assert_same_tensors,
    batches,
    build,
    context,
    random_images,
)

from anomaly_detection import models
from anomaly_detection.trainer import TrainingError

OWN = {
    "gaussian": {"max_channels": 40, "shrinkage": 0.1},
    "patchcore": {"max_patches": 150, "bank_size": 40},
}
IMAGES = random_images(6)


@pytest.fixture(params=OWN)
def name(request) -> str:
    return request.param


def parameters(name, **changes):
    values = {"backbone": "test_efficientnet", "weights": "random"} | OWN[name]
    return models.parameters(name)(**values | changes)


def fit_again(name, model, told, loader=None, **options):
    return models.spec(name).fit(
        model, told, context(batches(IMAGES) if loader is None else loader, **options)
    )


def fit(name, loader=None, **changes):
    told = parameters(name, **changes)
    model = build(name, told)
    fit_again(name, model, told, loader)
    return model


def test_the_fit_takes_a_pass_and_its_scales_another_both_in_the_order_of_the_first_epoch(name):
    loader = Watched(batches(IMAGES))
    fit(name, loader)
    assert (loader.epochs, loader.passes) == ([1, 1], 2)


def test_validation_images_are_fitted_to_as_well(name):
    told, first, rest = parameters(name), batches(IMAGES[:4], 2), batches(IMAGES[4:], 2)
    models = [build(name, told) for _ in range(2)]
    fit_again(name, models[0], told, first, validation=rest)
    fit_again(name, models[1], told, [*first, *rest], validation=[])
    assert_same_tensors(*models)


def test_a_second_fit_of_the_same_model_starts_anew(name):
    model, expected = fit(name, batches(random_images(4, seed=1))), fit(name)
    with pytest.raises(AssertionError):
        assert_same_tensors(model, expected)
    fit_again(name, model, parameters(name))
    assert_same_tensors(model, expected)


def test_the_global_generators_are_left_alone(name):
    def states():
        numpy = str(np.random.get_state())  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), numpy

    told = parameters(name)
    model = build(name, told)
    before = states()
    fit_again(name, model, told)
    assert states() == before


def test_the_fit_computes_in_the_precision_that_it_tells_and_keeps_float32(name):
    assert parameters(name).precision == "float32"  # by default, whatever the hardware has
    found = {}
    for precision in ("float32", "bfloat16"):
        told = parameters(name, precision=precision)
        model = build(name, told)
        assert fit_again(name, model, told).precision == precision
        floats = [x for x in model.state_dict().values() if x.is_floating_point()]
        assert {x.dtype for x in floats} == {torch.float32}
        found[precision] = model.bank if name == "patchcore" else model.gaussians[0].mean
    assert not torch.equal(*found.values())


def test_training_mode_changes_no_output(name):
    model, images = fit(name), random_images(2, seed=1)
    expected = model.eval()(images)
    torch.testing.assert_close(model.train()(images), expected, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_fit_without_images_is_refused(name):
    told = parameters(name)
    with pytest.raises(TrainingError, match=r"must have at least .* image.*, got (none|0)"):
        fit_again(name, build(name, told), told, [], validation=[])


def test_what_is_particular_stands_in_the_models_own_section(name):
    sections = parameters(name).by_section(name)
    assert sections[name] == OWN[name]
    assert set(sections["training"]) == {"batch_size", "precision", "seed"}
