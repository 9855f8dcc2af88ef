"""STFPM: the distance and its loss, standardised features, training, parameters."""

import math
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders.models import (
    CPU,
    Killed,
    assert_same_tensors,
    batches,
    context,
    generator,
    random_images,
)
from pydantic import ValidationError
from torch import nn

from anomaly_detection import models
from anomaly_detection.data import create_dataloader
from anomaly_detection.features.moments import Moments
from anomaly_detection.features.standardisation import Standardisation, add_channels
from anomaly_detection.models import FitContext, load_model, restore, snapshot
from anomaly_detection.models.stfpm import STFPMLoss, STFPMModel, STFPMTrainer, feature_distance
from anomaly_detection.trainer import Callback, set_epoch

SPEC = models.spec("stfpm")
BACKBONE = "test_resnet"  # with 48 and 192 channels at strides 8 and 16
EAST = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
NORTH = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
AROUND = [EAST, NORTH, -EAST, -NORTH]  # at distances of 0, 1, 2, 1 from the east


def new_model(layers=None, **options):
    torch.manual_seed(0)
    return STFPMModel(BACKBONE, layers, "random", **options)


def with_scales(model):
    """As after a fit: maps are standardised by images that the fit has not seen."""
    model.standardise(batches(random_images(4, seed=9)), CPU)
    return model


def train(model, images, num_epochs=1, validation=None, loss=None, **options):
    trainer = STFPMTrainer(model, loss, device="cpu", **{"checkpoint_dir": None} | options)
    trainer.fit(batches(images), validation, num_epochs)
    return trainer


def parameters(**changes):
    values = {"backbone": BACKBONE, "weights": "random", "precision": "float32"}
    return models.parameters("stfpm")(**values | changes)


@pytest.fixture
def model():
    return new_model()


@pytest.fixture
def images():
    return random_images(4)


def random_features(channels=8):
    """A teacher's and a student's."""
    return torch.randn(2, 3, channels, 5, 5, generator=generator())


# Distance and loss


@pytest.mark.parametrize(
    ("student", "expected"), [(EAST, 0.0), (5 * EAST, 8.0), (NORTH, 1.0), (-EAST, 2.0)]
)
def test_distance_is_the_mean_squared_difference_of_the_channels(student, expected):
    assert feature_distance(EAST, student).item() == expected


def test_distance_is_float32_also_of_bfloat16_features():
    assert feature_distance(EAST.bfloat16(), NORTH.bfloat16()).dtype == torch.float32


def test_distance_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"same shape, got \(1, 2, 1, 1\) and \(1, 2, 2, 1\)"):
        feature_distance(EAST, torch.cat([EAST, EAST], dim=2))


def test_loss_does_not_depend_on_batch_size():
    teacher, student = random_features()
    once = STFPMLoss()({"a": teacher}, {"a": student})
    twice = STFPMLoss()({"a": teacher.repeat(2, 1, 1, 1)}, {"a": student.repeat(2, 1, 1, 1)})
    assert once.item() == pytest.approx(twice.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("hard_fraction", "fine", "coarse"),
    [(1.0, 1.0, 1.0), (0.8, 4 / 3, 1.0), (0.5, 1.5, 2.0), (0.25, 2.0, 2.0), (0.01, 2.0, 2.0)],
)
def test_loss_is_the_sum_over_levels_of_the_mean_distance_of_the_hardest_positions(
    hard_fraction, fine, coarse
):
    """The nearest number of them, and at least one."""
    # Fine level: distances 0, 1, 2, 1; coarse level: 2 and 0.
    teacher = {"fine": EAST.expand(1, 2, 1, 4), "coarse": EAST.expand(1, 2, 1, 2)}
    student = {"fine": torch.cat(AROUND, dim=3), "coarse": torch.cat([-EAST, EAST], dim=3)}
    assert STFPMLoss(hard_fraction)(teacher, student).item() == pytest.approx(fine + coarse)
    assert STFPMLoss().hard_fraction == 1  # the paper's: all positions (eqs. 2 and 3)


def test_the_hardest_positions_are_those_of_each_image():
    # The first image's distances are 0 and 1, the second's 1 and 2.
    teacher = {"a": EAST.expand(2, 2, 1, 2)}
    student = {"a": torch.stack([torch.cat([EAST, NORTH], 3)[0], torch.cat([NORTH, -EAST], 3)[0]])}
    loss = STFPMLoss(0.5)
    assert loss.per_image(teacher, student).tolist() == pytest.approx([1, 2])
    assert loss(teacher, student).item() == pytest.approx(1.5)


def test_only_the_hardest_positions_have_a_gradient():
    teacher, student = random_features()
    student.requires_grad_()
    STFPMLoss(0.08)({"a": teacher}, {"a": student}).backward()
    moved = student.grad.abs().sum(dim=1).flatten(1) > 0
    hardest = feature_distance(teacher, student).flatten(1).topk(2).indices
    assert moved.sum(dim=1).tolist() == [2, 2, 2]
    assert moved.gather(1, hardest).all()


# Features, maps and scores


@pytest.mark.parametrize("batch", [[0, 1, 2], [2, 0, 1]])
def test_channels_are_standardised_by_hand(batch):
    # Channel 0: 1, 3, 5 (mean 3, variance 8 / 3); channel 1 is always 7.
    features = torch.tensor([[1.0, 7.0], [3.0, 7.0], [5.0, 7.0]]).view(3, 2, 1, 1)
    moments, standardise = Moments(), Standardisation(2)
    for image in batch:
        moments.add(features[image].view(1, 1, 2, 1))
    standardise.estimate(moments)
    first, second = standardise(features).flatten(1).T.tolist()
    assert first == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert second == [0, 0, 0]


def test_standardised_features_are_float32():
    assert Standardisation(2)(torch.ones(1, 2, 1, 1, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_fit_brings_each_channel_to_mean_0_and_deviation_1_over_its_images():
    """Over all positions of all images, whatever the batches; not those of validation."""
    model, images = STFPMModel("resnet18", weights="random"), random_images(7)
    loader = [{"image": part} for part in images.split([4, 2, 1])]
    STFPMTrainer(model, device="cpu", checkpoint_dir=None).fit(
        loader, batches(random_images(2, seed=1))
    )
    model.train()
    with torch.no_grad():
        raw = model.teacher_model(model.normalised(images))
        teacher, _ = model.extract(images)
    for name, features in teacher.items():
        channels = features.double().transpose(0, 1).flatten(1)
        spread = raw[name].transpose(0, 1).flatten(1).std(dim=1)  # 0 where a ReLU gives nothing
        deviations = channels.std(dim=1, correction=0)[spread > 0.2 * spread.median()]
        assert len(deviations) > 0.7 * len(spread)
        assert channels.mean(dim=1).abs().max() < 1e-4
        torch.testing.assert_close(deviations, torch.ones_like(deviations))


def test_a_channel_that_hardly_varies_gets_a_tenth_of_the_median_deviation():
    """Its first activation on a new image would outweigh all other channels."""
    moments, standardise = Moments(), Standardisation(3)
    features = torch.tensor([[1.0, -1.0], [4.0, -4.0], [0.0, 0.0]]).T.reshape(2, 3, 1, 1)
    add_channels(moments, features)
    standardise.estimate(moments)
    assert standardise.deviation.flatten().tolist() == pytest.approx([1.0, 4.0, 0.1])


def test_the_scale_of_the_teachers_features_and_their_offsets_change_no_score(images):
    def with_others(model, _, features):
        for level in features.values():
            offset = torch.rand(level.shape[1], 1, 1, generator=generator(1))
            level.mul_(64).add_(offset)

    outputs = []
    for are_others in (False, True):
        model = new_model()
        if are_others:
            model.teacher_model.register_forward_hook(with_others)
        train(model, images, num_epochs=2, learning_rate=1e-4)
        with torch.inference_mode():
            outputs.append(with_scales(model)(random_images(2, seed=1)))
    torch.testing.assert_close(*outputs, rtol=0.01, atol=0.01)


def test_maps_are_the_roots_of_the_distances_averaged_over_levels(monkeypatch):
    # Fine: distances 0, 1, 2, 1; coarse: 2.
    model = new_model(map_sizes=[(2, 2), (1, 1)]).eval()
    fine = torch.cat([torch.cat(AROUND[:2], 3), torch.cat(AROUND[2:], 3)], dim=2)
    teacher = {"fine": EAST.expand(1, 2, 2, 2), "coarse": EAST}
    student = {"fine": fine, "coarse": -EAST}
    monkeypatch.setattr(model, "extract", lambda images: (teacher, student))
    found = model(torch.zeros(1, 3, 2, 2))["anomaly_map"].flatten().tolist()
    root = 2**0.5  # of distance 2
    expected = [(0 + root) / 2, (1 + root) / 2, (root + root) / 2, (1 + root) / 2]
    assert found == pytest.approx(expected)


def test_inference_compares_with_the_standardised_teacher(model, images):
    train(model, images)
    with torch.inference_mode():
        maps = model.eval().maps(images)
        features = model.teacher_model(model.normalised(images))
        student = model.student_model(model.normalised(images))
        for found, standardise, name in zip(maps, model.standardisations, features, strict=True):
            difference = standardise(features[name]) - student[name]
            expected = difference.square().mean(dim=1).sqrt()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_training_mode_returns_features_of_strides_8_and_16(model, images):
    """The student's through a matrix, so that they can be negative as standardised ones are."""
    teacher, student = model.train()(images)
    assert list(teacher) == list(student) == ["layer2", "layer3"]
    assert all(level.min() >= 0 for level in teacher.values())  # not yet standardised: a ReLU's
    assert all(level.min() < 0 for level in student.values())
    heads = [tuple(head.weight.shape) for head in model.student_model.heads]
    assert heads == [(48, 48, 1, 1), (192, 192, 1, 1)]
    for features in (teacher, student):
        shapes = [tuple(level.shape) for level in features.values()]
        assert shapes == [(4, 48, 8, 8), (4, 192, 4, 4)]


def test_normalisation_is_that_of_the_weights():
    model = STFPMModel("test_efficientnet", weights="random")
    white = model.normalised(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(white[0, :, 0, 0], expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.3), (torch.float16, 0.05)], ids=str
)
def test_inference_in_16_bits_gives_nearly_the_same_scores_in_float32(
    model, images, dtype, tolerance
):
    """To a fraction of the maps' standard deviation."""
    with torch.inference_mode():
        expected = with_scales(model)(images)["pred_score"]
        outputs = restore(snapshot("stfpm", model), "cpu", dtype)(images)
    assert {values.dtype for values in outputs.values()} == {torch.float32}
    assert not torch.equal(outputs["pred_score"], expected)
    torch.testing.assert_close(outputs["pred_score"], expected, rtol=0, atol=tolerance)


# Training


def test_every_student_parameter_is_trained_and_none_of_the_teacher(model, images):
    """Backbone and heads."""
    assert all(parameter.requires_grad for parameter in model.student_model.parameters())
    assert not any(parameter.requires_grad for parameter in model.teacher_model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # Two steps, because ResNet's last BatchNorm of a block starts at zero.
    trainer = train(model, images, num_epochs=2, weight_decay=0)
    (group,) = trainer.optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, model.student_model.parameters()))
    trained = {f"student_model.{name}" for name, _ in model.student_model.named_parameters()}
    assert {name.split(".")[1] for name in trained} == {"pyramid", "heads"}
    for name, value in model.state_dict().items():
        if name in trained or name.startswith("teacher."):
            assert torch.equal(value, before[name]) == name.startswith("teacher."), name


def test_student_and_teacher_start_apart(model):
    pairs = zip(
        model.teacher_model.parameters(), model.student_model.pyramid.parameters(), strict=True
    )
    assert not all(torch.equal(teacher, student) for teacher, student in pairs)


def test_a_single_batch_is_learnt_by_heart():
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(4, 3, 8, 8), size=(64, 64), mode="bilinear")
    trainer = train(STFPMModel("tf_efficientnet_lite0"), images, num_epochs=60, learning_rate=0.01)
    assert trainer.history[-1]["train_loss"] < 0.1 * trainer.history[0]["train_loss"]


class RatesOfSteps(Callback):
    """The learning rate of each optimizer step."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self):
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("accumulate_batches", "num_epochs", "num_steps"),
    [(1, 4, None), (2, 7, None), (1, 100, 21), (5, 100, 18)],  # of 5 batches
)
def test_the_learning_rate_goes_through_one_cycle(accumulate_batches, num_epochs, num_steps):
    recorder, loader = RatesOfSteps(), batches(random_images(10, size=32), 2)
    options = {"learning_rate": 3e-3, "accumulate_batches": accumulate_batches}
    trainer = STFPMTrainer(
        new_model(), device="cpu", checkpoint_dir=None, callbacks=[recorder], **options
    )
    history = trainer.fit(loader, num_epochs=num_epochs, num_steps=num_steps)
    rates = recorder.rates
    assert len(rates) == (num_steps or num_epochs * math.ceil(5 / accumulate_batches))
    # From a 25th of the highest rate up, in 30 % of the steps, and then down to nothing.
    top = rates.index(max(rates))
    assert rates[0] == pytest.approx(3e-3 / 25)
    assert rates[top] == pytest.approx(3e-3, rel=0.05)
    assert top / len(rates) == pytest.approx(0.3, abs=0.05)
    assert rates == [*sorted(rates[:top]), *sorted(rates[top:], reverse=True)]
    assert 0 < history[-1]["learning_rate"] < 1e-6 < rates[-1] < 0.1 * 3e-3


@pytest.mark.parametrize(
    ("backbone", "weights"), [(BACKBONE, "random"), ("tf_efficientnet_lite0", "bundled")]
)
def test_gradient_checkpointing_changes_no_result(images, backbone, weights):
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = STFPMModel(backbone, weights=weights)
        model.set_gradient_checkpointing(enable)
        trainer = train(model, images, 2, batches(images), learning_rate=1e-3)
        history = [list(row.values()) for row in trainer.history]
        state = {name: value.double() for name, value in model.student_model.state_dict().items()}
        results.append((history, state))
    (losses, state), (same_losses, same_state) = results
    np.testing.assert_allclose(same_losses, losses, rtol=1e-5)
    torch.testing.assert_close(same_state, state, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_saves_activations(images):
    def num_saved(enable):
        model = STFPMModel("resnet18", weights="random")
        model.set_gradient_checkpointing(enable)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            STFPMLoss()(*model.train()(images))
        return sum(sizes)

    assert num_saved(True) < 0.75 * num_saved(False)


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [(None, [[8, 8], [4, 4]]), (["layer2", "layer1"], [[16, 16], [8, 8]])],
    ids=str,
)
def test_a_checkpoint_alone_rebuilds_the_model(tmp_path, images, layers, sizes):
    model = new_model(layers, top_fraction=0.1)
    train(model, images, checkpoint_dir=tmp_path, metadata={"a": 1})
    content = torch.load(tmp_path / "best_model.pth", weights_only=True)
    assert content["metadata"] == {"a": 1}
    assert content["epoch"] == 0
    rebuilt = STFPMModel(**content["hyperparameters"])
    rebuilt.load_state_dict(content["model_state_dict"])
    with_scales(rebuilt)
    assert rebuilt.hyperparameters["map_sizes"] == sizes
    torch.save(snapshot("stfpm", rebuilt), tmp_path / "model.pth")
    restored = load_model(tmp_path / "model.pth")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in restored.modules())
    assert not restored.training
    with torch.inference_mode():
        expected = with_scales(model).eval()(images)
        torch.testing.assert_close(restored(images), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "batch"),
    [({}, 0), ({"accumulate_batches": 2}, 2), ({"precision": "bfloat16"}, 2)],
    ids=str,
)
def test_a_resumed_training_writes_the_bytes_of_one_that_was_not_interrupted(
    tmp_path, options, batch
):
    """Optimizer, learning rate and standardisation go on where they were, in epoch 3 of 4."""
    data = [{"image": image} for image in random_images(10, size=32)]

    def train(folder, kills=False):
        loader = create_dataloader(data, 4, shuffle=True)
        told = {"device": "cpu", "checkpoint_dir": tmp_path / folder} | options
        trainer = STFPMTrainer(new_model(), STFPMLoss(0.1), **told)
        trainer.resume()
        assert len(trainer.history) == (2 if list((tmp_path / folder).iterdir()) else 0)
        if kills:

            def kill(_, batch_idx):
                if trainer.current_epoch == 2 and batch_idx == batch:
                    raise Killed

            trainer.on_train_batch_start = kill
        trainer.fit(loader, loader, num_epochs=4)

    train("whole")
    with pytest.raises(Killed):
        train("resumed", kills=True)
    train("resumed")
    for name in ("epoch_3.pth", "best_model.pth"):
        one, other = (tmp_path / folder / name for folder in ("whole", "resumed"))
        assert one.read_bytes() == other.read_bytes()


# Parameters and the fit


def test_by_default_the_cycle_is_not_cut_short():
    assert models.parameters("stfpm")().early_stopping_patience is None


@pytest.mark.parametrize("hard_fraction", [0.0, 1.1])
def test_a_hard_fraction_outside_of_0_to_1_is_refused(hard_fraction):
    with pytest.raises(ValidationError, match="hard_fraction"):
        parameters(hard_fraction=hard_fraction)


def test_parameters_reach_the_model_the_loss_and_the_optimizer(monkeypatch, tmp_path, images):
    optimizer = {"num_epochs": 3, "learning_rate": 0.003, "weight_decay": 0.01}
    told = parameters(layers=["layer1"], top_fraction=0.5, hard_fraction=0.3, **optimizer)
    model = SPEC.build(told)
    assert isinstance(model, SPEC.model)
    fractions, original = [], STFPMLoss.per_image

    def per_image(self, *features):
        fractions.append(self.hard_fraction)
        return original(self, *features)

    monkeypatch.setattr(STFPMLoss, "per_image", per_image)
    held_out = batches(random_images(5, seed=1))
    result = SPEC.fit(model, told, context(batches(images), held_out, tmp_path))
    assert model.hyperparameters == {
        "backbone": BACKBONE,
        "layers": ["layer1"],
        "weights": "random",
        "in_channels": 3,
        "top_fraction": 0.5,
        "map_sizes": [[16, 16]],
        "image_size": [64, 64],
    }
    assert set(fractions) == {0.3}
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    best = torch.load(tmp_path / "best_model.pth", weights_only=True)
    last = torch.load(tmp_path / "epoch_2.pth", weights_only=True)
    (group,) = last["optimizer_state_dict"]["param_groups"]
    assert (group["max_lr"], group["weight_decay"]) == (0.003, 0.01)
    assert (result.best_epoch, result.best_metrics) == (best["epoch"] + 1, best["metrics"])
    assert result.precision == "float32"

    # Maps are standardised with the best weights and the validation images.
    scales = {"scales.0.mean", "scales.0.deviation"}
    assert set(model.state_dict()) - set(best["model_state_dict"]) == scales
    expected = STFPMModel(**best["hyperparameters"])
    expected.load_state_dict(best["model_state_dict"])
    expected.standardise(held_out, CPU)
    assert_same_tensors(model, expected)


def test_a_fit_stops_when_its_patience_runs_out(tmp_path, images):
    told = parameters(num_epochs=50, learning_rate=1e-9, early_stopping_patience=1)
    validation = [{"image": 0 * images}]
    result = SPEC.fit(SPEC.build(told), told, context(batches(images), validation, tmp_path))
    assert len(result.history) < 50


@pytest.mark.parametrize(("num_images", "steps"), [(6, 42), (4 * 42, 42), (4 * 50, 50)])
def test_an_epoch_has_42_batches_at_least(num_images, steps, tmp_path, monkeypatch):
    """With fewer images each comes several times, each time in another order."""
    seen = []
    monkeypatch.setattr(FitContext, "train", lambda self, *_: seen.append(self.fit))
    data = [{"image": image, "index": i} for i, image in enumerate(random_images(num_images, 32))]
    loader = create_dataloader(data, 4, shuffle=True)
    told = context(loader, batches(random_images(2, 32)), tmp_path)
    SPEC.fit(new_model(), parameters(batch_size=4), told)
    (fit,) = seen
    assert len(fit) == steps
    indices = [x["index"].tolist() for x in fit]
    passes = [indices[i : i + len(loader)] for i in range(0, steps, len(loader))]
    assert all(sorted(chain(*x)) == list(range(num_images)) for x in passes)
    assert len({str(x) for x in passes}) == len(passes)
    set_epoch(fit, 2)
    assert [x["index"].tolist() for x in fit][: len(loader)] not in passes
